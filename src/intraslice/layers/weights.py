"""Neutral weights of a block, the edits that shrink them, and how an edit is fused into the weights.

Everything here is tensors: no modules, no devices, no files. Weights are [out, in].

Shapes: D hidden_size, H query heads, K kv heads, d head_dim, r pruned query/key width, p pruned value width,
F intermediate_size; primes (H', K', F') after pruning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intraslice.algebra.selection import heads_per_kv, kept_kv_heads
from intraslice.runtime.families_intraslice import LayerShape


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Weights of one attention block.

    Attributes:
        q: [H, d, D]; k, v: [K, d, D]; o: [D, H * d].
        q_bias: [H, d] or None; k_bias, v_bias: [K, d] or None; o_bias: [D] or None.
        q_norm: stored weights of the norm of the queries, [H, d], the same for all heads that share one; None without.
        k_norm: the same of the keys, [K, d].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.q.shape[0] // self.k.shape[0]


@dataclass(frozen=True, kw_only=True)
class FFNWeights:
    """Weights of one FFN block.

    Attributes:
        up, gate: [F, D] (gate is None when the FFN is not gated); down: [D, F].
        up_bias, gate_bias: [F] or None; down_bias: [D] or None.
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class NormEdit:
    """How the norm of narrower queries (or keys) comes near to the norm of the dense ones.

    Attributes:
        gain: factors on the norm's weight, of each kept head and dense channel, [H', d].
        row_scale: factors on the rows of the Linear, [H', d].
    """

    gain: Tensor
    row_scale: Tensor


@dataclass(frozen=True, kw_only=True)
class QKEdit:
    """The first half of an attention edit: heads, and what replaces query and key.

    Attributes:
        heads: kept query heads, ascending.
        width: p, kept dimensions of a value head, and of a query/key head if `qk_width` does not say otherwise.
        qk_width: r, kept dimensions of a query/key head where that is another number; None where it is not.
        channels: int64 [K', r] kept channels of query and key, where they are chosen one by one; None otherwise.
        query_norm, key_norm: what changes in the norms; None where nothing does.
        norm_offset: what a norm adds to its weight.
        rope_pairs: int64 [K', r / 2] kept RoPE pairs of each kept kv head; None without RoPE or when r = d.
        query_basis, key_basis: [K', d, r] dense bases; None with RoPE or when r = d.
        v_channels: int64 [K', p] kept channels of each value head; None leaves the choice to the second half.
        v_maps: value basis and what takes its place in front of o_proj, [K', d, p] and [K', p, d]; None as above.
    """

    heads: tuple[int, ...]
    width: int
    qk_width: int | None = None
    channels: Tensor | None = None
    query_norm: NormEdit | None = None
    key_norm: NormEdit | None = None
    norm_offset: float = 0.0
    rope_pairs: Tensor | None = None
    query_basis: Tensor | None = None
    key_basis: Tensor | None = None
    v_channels: Tensor | None = None
    v_maps: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class ValueEdit:
    """The second half of an attention edit.

    Attributes:
        v_basis: Q_2, [K', d, p]; a head's context is multiplied by it.
        o_weight: new o_proj [D, H' * p], which includes the reconstruction of Eq. 6.
        o_bias: [D], added to the bias of o_proj; None adds nothing.
    """

    v_basis: Tensor
    o_weight: Tensor
    o_bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FFNEdit:
    """What replaces the FFN.

    Attributes:
        channels: int64 [F'] kept channels, or None when the maps are dense.
        up_map, gate_map: Q_c, [F, F'] dense maps of the pre-activations (IterPCA), or None.
        down_weight: new down_proj [D, F'], which includes the reconstruction of Eq. 8.
        down_bias: [D], added to the bias of down_proj; None adds nothing.
    """

    channels: Tensor | None
    up_map: Tensor | None
    gate_map: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None = None


def _sum(bias: Tensor | None, more: Tensor | None) -> Tensor | None:
    if bias is None or more is None:
        return bias if more is None else more
    return (bias.double() + more).to(bias.dtype)


def rows_of_pairs(pairs_Kn2: Tensor, interleaved: bool) -> Tensor:
    """Return the channels of some rotary pairs in the order in which the rows of a head hold them, int64 [K, 2 n].

    Args:
        pairs_Kn2: the two channels of each pair.
        interleaved: whether the channels of a pair are side by side; else the first ones come before the second ones.
    """
    return pairs_Kn2.flatten(1) if interleaved else pairs_Kn2.transpose(1, 2).flatten(1)


def kept_channels(edit: QKEdit, pairs_to_channels: Tensor | None, interleaved: bool = False) -> Tensor | None:
    """Return the channels of a query/key head that an edit keeps, in the order of the new rows, int64 [K', r].

    None when all stay, or when they are mixed.
    """
    if edit.rope_pairs is None:
        return edit.channels
    if pairs_to_channels is None:
        raise ValueError("rope_pairs need the channels of each pair")
    return rows_of_pairs(pairs_to_channels[edit.rope_pairs], interleaved)


def _edited_norm(norm_Hd: Tensor, edit: NormEdit | None, offset: float) -> Tensor:
    if edit is None:
        return norm_Hd
    return (edit.gain * (norm_Hd.double() + offset) - offset).to(norm_Hd.dtype)


def _scaled(rows: Tensor, edit: NormEdit | None) -> Tensor:
    """Return rows of heads, [H', d, ...], with the factors of an edit."""
    if edit is None:
        return rows
    return (rows.double() * edit.row_scale.view(*edit.row_scale.shape, *[1] * (rows.dim() - 2))).to(rows.dtype)


def fuse_qk(
    weights: AttentionWeights, edit: QKEdit, pairs_to_channels: Tensor | None, interleaved: bool = False
) -> tuple[AttentionWeights, tuple[int, ...]]:
    """Return weights with pruned heads and query/key rows; value and output keep the full width of kept heads.

    Args:
        weights: the dense block.
        edit: heads and query/key choice.
        pairs_to_channels: int64 [d / 2, 2], the two channels of each RoPE pair; None without RoPE.
        interleaved: whether the channels of a pair are side by side in a head.

    Returns:
        Weights with q [H', r, D], k [K', r, D], v [K', d, D], o [D, H' * d], and heads_per_kv.
    """
    group = weights.group
    heads = list(edit.heads)
    kv_heads = list(kept_kv_heads(heads, group))
    kv_position = [kv_heads.index(head // group) for head in heads]
    per_kv = heads_per_kv(heads, group)
    head_dim = weights.q.shape[1]
    q, k = _scaled(weights.q[heads], edit.query_norm), _scaled(weights.k[kv_heads], edit.key_norm)
    q_bias = None if weights.q_bias is None else _scaled(weights.q_bias[heads], edit.query_norm)
    k_bias = None if weights.k_bias is None else _scaled(weights.k_bias[kv_heads], edit.key_norm)
    q_norm = None if weights.q_norm is None else _edited_norm(weights.q_norm[heads], edit.query_norm, edit.norm_offset)
    k_norm = None if weights.k_norm is None else _edited_norm(weights.k_norm[kv_heads], edit.key_norm, edit.norm_offset)
    channels_Kr = kept_channels(edit, pairs_to_channels, interleaved)
    if channels_Kr is not None:

        def of_queries(rows: Tensor | None) -> Tensor | None:
            if rows is None:
                return None
            return torch.stack([head[channels_Kr[kv]] for head, kv in zip(rows, kv_position, strict=True)])

        def of_keys(rows: Tensor | None) -> Tensor | None:
            if rows is None:
                return None
            return torch.stack([head[channels] for head, channels in zip(rows, channels_Kr, strict=True)])

        q, q_bias, q_norm = of_queries(q), of_queries(q_bias), of_queries(q_norm)
        k, k_bias, k_norm = of_keys(k), of_keys(k_bias), of_keys(k_norm)
        assert q is not None and k is not None
    elif edit.query_basis is not None and edit.key_basis is not None:
        query_basis = edit.query_basis[kv_position].to(q.dtype)
        key_basis = edit.key_basis.to(k.dtype)
        q = query_basis.transpose(1, 2) @ q
        k = key_basis.transpose(1, 2) @ k
        q_bias = None if q_bias is None else torch.einsum("hdr,hd->hr", query_basis, q_bias)
        k_bias = None if k_bias is None else torch.einsum("kdr,kd->kr", key_basis, k_bias)
    columns = torch.cat([torch.arange(head * head_dim, (head + 1) * head_dim) for head in heads])
    fused = AttentionWeights(
        q=q,
        k=k,
        v=weights.v[kv_heads],
        o=weights.o[:, columns],
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=None if weights.v_bias is None else weights.v_bias[kv_heads],
        o_bias=weights.o_bias,
        q_norm=q_norm,
        k_norm=k_norm,
    )
    return fused, per_kv


def fuse_value(weights: AttentionWeights, edit: ValueEdit) -> AttentionWeights:
    """Fuse Q_2 into v_proj and the reconstruction into o_proj: W_v' = Q_2^T W_v.

    Args:
        weights: the output of `fuse_qk`.
        edit: value basis and new output weight.
    """
    basis = edit.v_basis.to(weights.v.dtype)
    return replace(
        weights,
        v=basis.transpose(1, 2) @ weights.v,
        o=edit.o_weight.to(weights.o.dtype),
        v_bias=None if weights.v_bias is None else torch.einsum("kdp,kd->kp", basis, weights.v_bias),
        o_bias=_sum(weights.o_bias, edit.o_bias),
    )


def fuse_ffn(weights: FFNWeights, edit: FFNEdit) -> FFNWeights:
    """Fuse Q_c into up and gate, and the reconstruction into down: W_up' = Q_c^T W_up."""

    def mapped(matrix: Tensor | None, dense_map: Tensor | None) -> Tensor | None:
        if matrix is None:
            return None
        if edit.channels is not None:
            return matrix[edit.channels]
        if dense_map is None:
            raise ValueError("an FFN edit needs channels or maps")
        return dense_map.to(matrix.dtype).T @ matrix

    up = mapped(weights.up, edit.up_map)
    assert up is not None
    return FFNWeights(
        up=up,
        gate=mapped(weights.gate, edit.gate_map),
        down=edit.down_weight.to(weights.down.dtype),
        up_bias=mapped(weights.up_bias, edit.up_map),
        gate_bias=mapped(weights.gate_bias, edit.gate_map),
        down_bias=_sum(weights.down_bias, edit.down_bias),
    )


def attention_shape(
    per_kv: tuple[int, ...],
    weights: AttentionWeights,
    intermediate_size: int,
    output_bias: bool = False,
    headed_qk_norm: bool = False,
) -> LayerShape:
    """Return the layer shape that these attention weights have.

    Args:
        per_kv: query heads of each kv head.
        weights: of the block.
        intermediate_size: of the FFN.
        output_bias: whether an edit adds a bias to an output projection.
        headed_qk_norm: whether the norms of query and key differ from head to head.
    """
    return LayerShape(
        heads_per_kv=per_kv,
        qk_head_dim=weights.q.shape[1],
        v_head_dim=weights.v.shape[1],
        intermediate_size=intermediate_size,
        output_bias=output_bias,
        headed_qk_norm=headed_qk_norm,
    )
