"""Attention and models of pruned checkpoints.

This file travels with every pruned checkpoint (`trust_remote_code=True`), so it may import only the standard
library, torch, transformers and its neighbours.

Shapes: B batch, T new tokens, S tokens in the cache, D hidden_size, H query heads, K kv heads, r qk_head_dim,
p v_head_dim, d head_dim of the dense model.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from .configuration_intraslice import (
    CACHE_NAMES,
    PREFIX,
    class_stem,
    composite_config_class,
    config_class,
    dense_config,
    dense_head_dim,
    dense_sizes,
    family_of,
    family_of_class,
    rotary_dim,
    rotated,
    stock_config_class,
)
from .families_intraslice import FAMILIES, FamilySpec, LayerShape, grouped_sizes
from .shortcuts_intraslice import add_shortcuts

if TYPE_CHECKING:
    _ModelBase = PreTrainedModel
else:
    _ModelBase = object


def pair_channels(rotary_dim: int, head_dim: int, interleaved: bool = False) -> torch.Tensor:
    """Return the two channels of every rotary pair of a dense head.

    Args:
        rotary_dim: number of rotated channels; they come first.
        head_dim: width of the dense head. The channels that are not rotated form pairs too, with angle 0.
        interleaved: whether the two channels of a pair are side by side.

    Returns:
        int64 [d/2, 2], rotated pairs first.

    Raises:
        ValueError: when one of the two widths is odd.
    """
    if rotary_dim % 2 or head_dim % 2:
        raise ValueError(
            f"head_dim {head_dim} with {rotary_dim} rotated channels has no rotary pairs; both must be even."
        )
    if interleaved:
        return torch.arange(head_dim).view(-1, 2)
    rotated = torch.arange(rotary_dim // 2)
    passed = torch.arange((head_dim - rotary_dim) // 2)
    first = torch.cat((rotated, rotary_dim + passed))
    second = torch.cat((rotated + rotary_dim // 2, (head_dim + rotary_dim) // 2 + passed))
    return torch.stack((first, second), dim=1)


def _rotate(x_BTHr: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        first, second = x_BTHr[..., 0::2], x_BTHr[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    first, second = x_BTHr.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that also returns its weights.

    Args:
        module: its `num_key_value_groups` query heads share a kv head.
        query: [B, H, T, r].
        key: [B, K, S, r].
        value: [B, K, S, p].
        attention_mask: added to the scores, [B or 1, 1, T, S], or None.
        scaling: factor on the scores.
        dropout: probability.
        softcap: cap of the scores, softcap * tanh(scores / softcap); None for none.
        kwargs: not used; other attention functions take more.

    Returns:
        context [B, T, H, p] and weights [B, H, T, S].
    """
    groups = module.num_key_value_groups
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # [B, H, T, S]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Take the cache out of the arguments of a layer, whatever it is called there; None where there is none."""
    caches = [kwargs.pop(name, None) for name in CACHE_NAMES]
    return next((cache for cache in caches if cache is not None), None)


# What an attention function sees instead of the module when the heads of a group are laid out as tokens.
_PACKED = SimpleNamespace(num_key_value_groups=1, is_causal=False, training=False)


class PrunedAttention(nn.Module):
    """Attention of one layer with its own head counts and widths, for every family.

    Linears carry the names of the family. The softmax scale stays that of the dense head. Query heads are
    sorted by kv head. When query and key keep fewer channels than the dense head and the layer has RoPE, the
    buffer `rope_index` [K, r/2] holds the kept pairs of each kv head (rows of `pair_channels`); a head's rows
    of q and k are then the first channels of these pairs, followed by the second channels (or, where the family lays
    pairs out side by side, pair after pair). Norms of query and key are the modules of the stock class; their weight
    has another size where heads or channels went.

    Args:
        config: of the model (dense or pruned).
        layer_idx: number of the layer, for the cache.
        spec: the family.
        shape: of the layer.
        stock: the attention module that is replaced, of the stock class or one of this class. What it knows is
            inherited: softmax scale, causality, window, dropout, cap of the scores.

    Raises:
        ValueError: when the layer has RoPE and qk_head_dim is odd or larger than the dense head.
    """

    rope_index: torch.Tensor | None
    head_slot: torch.Tensor | None
    attn: Any

    def __init__(self, config: PretrainedConfig, layer_idx: int, spec: FamilySpec, shape: LayerShape, stock: nn.Module):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.spec = spec
        self.shape = shape
        dense_dim = dense_head_dim(config, layer_idx)
        inherited = vars(stock)
        self.is_causal = inherited["is_causal"]
        self.scaling = inherited.get("scaling", dense_dim**-0.5)
        dropout = _dropout_of(stock, "attention_dropout", "attn_dropout")
        # Some configs have no such field, but then the module knows.
        self.attention_dropout = config.attention_dropout if dropout is None else dropout
        self.residual_dropout = _dropout_of(stock, "residual_dropout", "resid_dropout") or 0.0
        self.attn_logit_softcapping = inherited.get("attn_logit_softcapping")
        # Some modules hold the window of the model, and use it only where they are told to.
        self.sliding_window = inherited.get("sliding_window") if inherited.get("is_sliding", True) else None
        if spec.sliding_window is not None:
            self.sliding_window = vars(config).get(spec.sliding_window)

        self.num_heads = shape.num_attention_heads
        self.num_kv_heads = shape.num_key_value_heads
        self.qk_head_dim = shape.qk_head_dim
        self.v_head_dim = shape.v_head_dim
        self.max_group = max(shape.heads_per_kv)
        self.ragged = min(shape.heads_per_kv) != self.max_group
        # Attention functions repeat K and V by this number; ragged groups gather before the call instead.
        self.num_key_value_groups = 1 if self.ragged else self.max_group

        hidden = config.hidden_size
        rows = (self.num_heads * shape.qk_head_dim, self.num_kv_heads * shape.qk_head_dim)
        rows += (self.num_kv_heads * shape.v_head_dim,)
        self.qkv_rows = rows
        qkv_bias = _flag(config, spec.qkv_bias)
        if spec.q.parts:
            self.add_module(spec.q.path, nn.Linear(hidden, sum(rows), bias=qkv_bias))
        else:
            for slot, size in zip((spec.q, spec.k, spec.v), rows, strict=True):
                self.add_module(slot.path, nn.Linear(hidden, size, bias=qkv_bias))
        context_dim = self.num_heads * shape.v_head_dim
        o_bias = _flag(config, spec.o_bias) or shape.output_bias
        self.add_module(spec.o.path, nn.Linear(context_dim, hidden, bias=o_bias))

        self.interleaved = spec.interleaved
        self.rotated = rotated(config, spec, layer_idx)
        self.rotary_half = rotary_dim(config, layer_idx) // 2 if self.rotated else 0
        self.unrotated_pairs = dense_dim // 2 - self.rotary_half if self.rotated else 0
        self.selects_pairs = self.rotated and shape.qk_head_dim != dense_dim
        if self.selects_pairs and (shape.qk_head_dim % 2 or shape.qk_head_dim > dense_dim):
            raise ValueError(f"layer {layer_idx}: qk_head_dim {shape.qk_head_dim} is not even or exceeds {dense_dim}")
        self.register_indices()

    def register_indices(self) -> None:
        """Create the index buffers on the default device: the first pairs, and the place of each head.

        They are persistent, because others are lost when a model is built on the meta device.
        """
        pairs = torch.arange(self.qk_head_dim // 2).repeat(self.num_kv_heads, 1)
        self.register_buffer("rope_index", pairs if self.selects_pairs else None)
        groups = enumerate(self.shape.heads_per_kv)
        slots = torch.tensor([kv * self.max_group + i for kv, size in groups for i in range(size)])
        self.register_buffer("head_slot", slots if self.ragged else None)

    def has_shape(self, shape: LayerShape) -> bool:
        """Return whether the attention part of `shape` is that of this module."""
        own = self.shape
        return (shape.heads_per_kv, shape.qk_head_dim, shape.v_head_dim, shape.headed_qk_norm) == (
            own.heads_per_kv,
            own.qk_head_dim,
            own.v_head_dim,
            own.headed_qk_norm,
        )

    def take_norms(self, stock: nn.Module) -> None:
        """Take over the norms of query and key, with a weight of the size that this shape needs.

        Args:
            stock: the attention module that is replaced.
        """
        norms = self.spec.qk_norm
        if norms is None:
            return
        width = self.qk_head_dim
        for name, heads in ((norms.q, self.num_heads), (norms.k, self.num_kv_heads)):
            size = (heads * width,) if norms.over == "all" else (width,)
            if self.shape.headed_qk_norm:
                size = (heads, width)
            norm = _resized_norm(stock.get_submodule(name), size)
            if self.shape.headed_qk_norm:
                # vLLM puts a norm of its own, with one weight for all heads, in the place of a module without children
                # that computes what a norm does.
                norm._modules = {"own_weight_per_head": nn.Identity()}
            self.add_module(name, norm)

    def norm_query_key(self, query_BTHr: torch.Tensor, key_BTKr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return query and key after their norms; the same where the family has none."""
        norms = self.spec.qk_norm
        if norms is None:
            return query_BTHr, key_BTKr
        query_norm, key_norm = getattr(self, norms.q), getattr(self, norms.k)
        if norms.over == "all":
            query = query_norm(query_BTHr.flatten(2)).view(query_BTHr.shape)
            return query, key_norm(key_BTKr.flatten(2)).view(key_BTKr.shape)
        return query_norm(query_BTHr), key_norm(key_BTKr)

    def set_rope_pairs(self, pairs: torch.Tensor) -> None:
        """Choose the kept pairs of each kv head.

        Args:
            pairs: int64 [K, r/2], rows of `pair_channels`.

        Raises:
            ValueError: when the layer keeps all pairs, or has another number of them.
        """
        if self.rope_index is None or tuple(pairs.shape) != tuple(self.rope_index.shape):
            wanted = "no" if self.rope_index is None else tuple(self.rope_index.shape)
            raise ValueError(f"layer {self.layer_idx} takes {wanted} rotary pairs, not {tuple(pairs.shape)}")
        self.rope_index.copy_(pairs)

    def project(
        self,
        hidden_BTD: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key (after RoPE) and value, as they go into the cache.

        Args:
            hidden_BTD: input of attention, [B, T, D].
            position_embeddings: cos and sin, each [B or 1, T, rotary channels]; None without RoPE.
            position_ids: positions of the tokens, [B or 1, T]; only queries with a temperature need them.

        Returns:
            query [B, H, T, r], key [B, K, T, r], value [B, K, T, p].
        """
        query, key, value = self.project_rows(hidden_BTD)
        after_rope = self.spec.qk_norm is not None and self.spec.qk_norm.after_rope
        if not after_rope:
            query, key = self.norm_query_key(query, key)
        if self.rotated:
            query, key = self._apply_rope(query, key, position_embeddings)
        if after_rope:
            query, key = self.norm_query_key(query, key)
        if self.spec.query_temperature:
            assert position_ids is not None
            query = query * self._temperature(position_ids).to(query.dtype)
        # Some families rotate in float32 whatever the model computes in.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _temperature(self, position_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the factor of the queries at each position, [B, T, 1, 1]."""
        rope = self.config.rope_parameters
        periods = torch.floor(position_ids_BT / rope["original_max_position_embeddings"])
        return (1 + rope["llama_4_scaling_beta"] * torch.log(1 + periods))[..., None, None]

    def project_rows(self, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query [B, T, H, r], key [B, T, K, r] and value [B, T, K, p] as the Linears give them."""
        B, T, _ = hidden_BTD.shape
        if self.spec.q.grouped:
            query, key, value = self._split_grouped(getattr(self, self.spec.q.path)(hidden_BTD))
        elif self.spec.q.parts:
            query, key, value = getattr(self, self.spec.q.path)(hidden_BTD).split(self.qkv_rows, dim=-1)
        else:
            query = getattr(self, self.spec.q.path)(hidden_BTD)
            key = getattr(self, self.spec.k.path)(hidden_BTD)
            value = getattr(self, self.spec.v.path)(hidden_BTD)
        query = query.reshape(B, T, self.num_heads, self.qk_head_dim)
        key = key.reshape(B, T, self.num_kv_heads, self.qk_head_dim)
        # vLLM needs contiguous values when their width is not that of the keys.
        return query, key, value.contiguous().view(B, T, self.num_kv_heads, self.v_head_dim)

    def _split_grouped(self, fused_BTR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the rows of query, key and value of a fused Linear whose rows go by kv head."""
        sizes = grouped_sizes(self.shape)
        if self.ragged:
            parts = fused_BTR.split([size for group in sizes for size in group], dim=-1)
            query, key, value = (torch.cat(parts[part::3], dim=-1) for part in range(3))
            return query, key, value
        return fused_BTR.unflatten(-1, (self.num_kv_heads, -1)).split(sizes[0], dim=-1)  # type: ignore[return-value]

    def _apply_rope(
        self, query_BTHr: torch.Tensor, key_BTKr: torch.Tensor, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.spec.rope_layout == "interleaved_tables":
            cos, sin = (table[..., ::2] for table in position_embeddings)
        else:
            # Both halves of cos and sin are the same angles.
            cos, sin = (table[..., : self.rotary_half] for table in position_embeddings)
        if self.unrotated_pairs:
            cos = nn.functional.pad(cos, (0, self.unrotated_pairs), value=1.0)
            sin = nn.functional.pad(sin, (0, self.unrotated_pairs))
        if self.rope_index is None:
            return self._rotate_dense(query_BTHr, key_BTKr, cos, sin)
        cos_BTKr, sin_BTKr = cos[..., self.rope_index], sin[..., self.rope_index]
        key = _rotate(key_BTKr, cos_BTKr, sin_BTKr, self.interleaved)
        if self.head_slot is not None:
            kv_of_head = self.head_slot // self.max_group
            cos_BTHr, sin_BTHr = cos_BTKr.index_select(2, kv_of_head), sin_BTKr.index_select(2, kv_of_head)
            return _rotate(query_BTHr, cos_BTHr, sin_BTHr, self.interleaved), key
        grouped = query_BTHr.unflatten(2, (self.num_kv_heads, self.max_group))
        cos_BTKr, sin_BTKr = cos_BTKr.unsqueeze(3), sin_BTKr.unsqueeze(3)
        return _rotate(grouped, cos_BTKr, sin_BTKr, self.interleaved).flatten(2, 3), key

    def _rotate_dense(
        self, query_BTHd: torch.Tensor, key_BTKd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        both = (query_BTHd, key_BTKd)
        if not self.unrotated_pairs:
            query, key = (_rotate(x, cos, sin, self.interleaved) for x in both)
            return query, key
        width = 2 * self.rotary_half
        cos, sin = cos[..., : self.rotary_half], sin[..., : self.rotary_half]
        query, key = (
            torch.cat((_rotate(x[..., :width], cos, sin, self.interleaved), x[..., width:]), dim=-1) for x in both
        )
        return query, key

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the input of the output projection, and the attention weights if the kernel has them.

        Args:
            query: [B, H, T, r].
            key: [B, K, S, r].
            value: [B, K, S, p].
            attention_mask: what the attention function of the config takes.
            kwargs: passed on to the attention function.

        Returns:
            context [B, T, H * p], and weights [B, H, T, S] or None.
        """
        name = self.config._attn_implementation or "eager"
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        B, _, T, _ = query.shape
        one_token = T == 1 and name in ("sdpa", "eager") and not self.training
        packed = one_token and self.max_group > 1
        if packed:
            query, kwargs = self._pack(query), {**kwargs, "is_causal": False}
        elif self.head_slot is not None:
            kv_of_head = self.head_slot // self.max_group
            key, value = key.index_select(1, kv_of_head), value.index_select(1, kv_of_head)
        if self.qk_head_dim != self.v_head_dim and name != "eager" and not one_token:
            # Fast kernels want one width. Copying the cache for a single token costs more than it gains.
            width = max(self.qk_head_dim, self.v_head_dim)
            query, key, value = (_widened(x, width) for x in (query, key, value))
        if self.sliding_window is not None:
            kwargs["sliding_window"] = self.sliding_window
        if self.attn_logit_softcapping is not None:
            kwargs["softcap"] = self.attn_logit_softcapping
        context, weights = attention(
            _PACKED if packed else self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if packed:
            return self._unpack(context.transpose(1, 2)).flatten(1).unsqueeze(1), self._unpack(weights)
        return self._narrowed(context, B, T), weights

    def _narrowed(self, context: torch.Tensor, B: int, T: int) -> torch.Tensor:
        """Return [B, T, H * p], without the channels that `_widened` added."""
        context = context.reshape(B, T, self.num_heads, -1)
        if context.shape[-1] != self.v_head_dim:
            context = context[..., : self.v_head_dim]
        return context.flatten(2)

    def _pack(self, query_BH1r: torch.Tensor) -> torch.Tensor:
        """Lay the heads of a group out as tokens, [B, K, G, r], so that the cache is not copied."""
        query = query_BH1r.squeeze(2)
        if self.head_slot is not None:
            slots = query.new_zeros(query.shape[0], self.num_kv_heads * self.max_group, query.shape[2])
            query = slots.index_copy(1, self.head_slot, query)
        return query.unflatten(1, (self.num_kv_heads, self.max_group))

    def _unpack(self, x_BKGe: Any) -> Any:
        """Return [B, H, 1, e] for what an attention function gave for packed queries."""
        if x_BKGe is None:
            return None
        heads = x_BKGe.flatten(1, 2)
        if self.head_slot is not None:
            heads = heads.index_select(1, self.head_slot)
        return heads.unsqueeze(2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output of attention [B, T, D], and the weights if the kernel has them.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: cos and sin of the model; None without RoPE.
            attention_mask: what the attention function of the config takes.
            kwargs: the cache to read and to extend, under one of `CACHE_NAMES`; the rest is passed on to the attention
                function.
        """
        cache = take_cache(kwargs)
        query, key, value = self.project(hidden_states, position_embeddings, kwargs.get("position_ids"))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if self.config._attn_implementation == "vllm":
            # vLLM keeps the cache itself. It recognises an attention layer by this look-up, this one call and its
            # `scaling`, in the source of this very function.
            attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface("vllm", eager_attention_forward)
            # `attn` is what vLLM attached here; its cache has one width for keys and values, that of the config.
            query, key, value = (_widened(x, self.attn.head_size) for x in (query, key, value))
            context, weights = attention(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
            context = self._narrowed(context, *hidden_states.shape[:2])
        else:
            context, weights = self.attend(query, key, value, attention_mask, **kwargs)
        output = getattr(self, self.spec.o.path)(context)
        if self.residual_dropout and self.training:
            output = nn.functional.dropout(output, p=self.residual_dropout)
        return output, weights


def _dropout_of(stock: nn.Module, *names: str) -> float | None:
    """Return the probability that a module has under one of these names, as a number or as a module of its own."""
    found = next((getattr(stock, name) for name in names if hasattr(stock, name)), None)
    return found.p if isinstance(found, nn.Dropout) else found


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def _nothing(x: torch.Tensor) -> torch.Tensor:
    """Return zeros of the shape of `x` that take the memory of one number."""
    return x.new_zeros(1).expand(x.shape)


class DroppedAttention(nn.Module):
    """Stands where a layer has no attention: adds nothing, and has no weights.

    The model counts its positions, and makes its masks, by the first layer of each kind in the cache. Where that is
    this layer, one channel of zeros per token is kept there, so that any cache counts as it always does.

    Args:
        config: of the model.
        layer_idx: number of the layer, for the cache.
        shape: of the layer.
    """

    def __init__(self, config: PretrainedConfig, layer_idx: int, shape: LayerShape) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.shape = shape
        self.scaling = 1.0
        self.attends = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return zeros [B, T, D], and no attention weights.

        Args:
            hidden_states: [B, T, D].
            args: not read; other attention modules take more.
            kwargs: the cache to extend, under one of `CACHE_NAMES`; the rest is not read.
        """
        cache = take_cache(kwargs)
        if cache is not None and self._counts(cache):
            B, T, _ = hidden_states.shape
            token_B1T1 = hidden_states.new_zeros(B, 1, T, 1)
            cache.update(token_B1T1, token_B1T1, self.layer_idx)
        if self.attends:
            # Never. But vLLM runs only layers in whose source it finds this look-up and this one call.
            attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface("vllm", eager_attention_forward)
            return attention(self, hidden_states, hidden_states, hidden_states, None, scaling=self.scaling)
        return _nothing(hidden_states), None

    def _counts(self, cache: Cache) -> bool:
        kinds = cache.is_sliding
        # A cache that grows by the layer may not have come so far.
        return self.layer_idx == 0 or (
            self.layer_idx < len(kinds) and kinds.index(kinds[self.layer_idx]) == self.layer_idx
        )


class DroppedFFN(nn.Module):
    """Stands where a layer has no FFN, or has its last projection: adds nothing, and has no weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return zeros, [..., D], with memory of their own: layers of parallel blocks may add to them in place."""
        return torch.zeros_like(hidden_states)


class FactoredLinear(nn.Module):
    """A Linear whose weight is stored as two factors: W = second first.

    Args:
        in_features, out_features: of the whole.
        rank: width between the factors.
        bias: whether the second factor has a bias.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def like(cls, linear: nn.Linear, rank: int) -> FactoredLinear:
        """Return one in the place of `linear`, with uninitialised weights."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, rank, linear.bias is not None)
        weight = linear.weight
        new = new.to(weight.dtype).requires_grad_(weight.requires_grad).train(linear.training)
        return new if weight.device.type == "meta" else new.to_empty(device=weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] for [..., in_features]."""
        return self.second(self.first(x))


def _flag(config: PretrainedConfig, value: bool | str) -> bool:
    return getattr(config, value) if isinstance(value, str) else value


def apply_layer_shape(
    layer: nn.Module, config: PretrainedConfig, spec: FamilySpec, layer_idx: int, shape: LayerShape
) -> None:
    """Give a decoder layer another shape, in place.

    Its attention becomes a `PrunedAttention` (one that has the shape already is left alone), its FFN Linears
    are resized; then come the factors and the matrices of the residual connections, if the shape has any. Device
    and dtype stay, the meta device too. A Linear whose size does not change keeps its parameters, the others hold
    uninitialised memory; a new `rope_index` holds the first pairs, and a bias that the shape adds to an output
    projection is zero. A dropped block is replaced by one without weights that adds nothing, and cannot come back.

    Args:
        layer: decoder layer of the stock class, or one that was changed by this function before.
        config: of the model (dense or pruned).
        spec: the family.
        layer_idx: number of the layer.
        shape: the new shape.
    """
    old = layer.get_submodule(spec.attention)
    if not shape.has_attention:
        layer.set_submodule(spec.attention, DroppedAttention(config, layer_idx, shape))
    elif isinstance(old, PrunedAttention) and old.has_shape(shape):
        old.shape = shape
    else:
        with torch.device("meta"):
            new = PrunedAttention(config, layer_idx, spec, shape, old)
        with torch.device(next(old.parameters()).device):
            new.register_indices()
        for path in dict.fromkeys(slot.path for slot in (spec.q, spec.k, spec.v, spec.o)):
            fresh: Any = new.get_submodule(path)
            new.set_submodule(path, _resized(old.get_submodule(path), fresh.out_features, fresh.in_features))
        new.take_norms(old)
        layer.set_submodule(spec.attention, new.train(layer.training))

    mlp: Any = layer.get_submodule(spec.mlp) if spec.mlp else layer
    hidden, ffn = config.hidden_size, shape.intermediate_size
    if not shape.has_ffn:
        _drop_ffn(layer, spec)
    else:
        for slot in (spec.up, spec.gate):
            if slot is not None:
                rows = ffn * max(1, len(slot.parts))
                mlp.set_submodule(slot.path, _resized(mlp.get_submodule(slot.path), rows, hidden))
        down = _resized(mlp.get_submodule(spec.down.path), shape.output_size or hidden, ffn)
        mlp.set_submodule(spec.down.path, down)
        if spec.mlp:
            mlp.intermediate_size = ffn
    if shape.dropped:
        _drop_norms(layer, config, spec, shape)
    if shape.output_bias:
        for kept, (_, output) in ((shape.has_attention, spec.attention_paths), (shape.has_ffn, spec.ffn_paths)):
            if kept:
                _add_bias(layer.get_submodule(output))
    for path, rank in shape.ranks:
        layer.set_submodule(path, FactoredLinear.like(layer.get_submodule(path), rank))  # type: ignore[arg-type]
    if shape.shortcuts:
        add_shortcuts(layer, spec, hidden, shape.output_size or hidden)


def _drop_ffn(layer: nn.Module, spec: FamilySpec) -> None:
    if spec.mlp:
        layer.set_submodule(spec.mlp, DroppedFFN())
        return
    # Linears of the layer itself: what stands before the last one passes on what nobody reads.
    reading, output = spec.ffn_paths
    for path in reading:
        layer.set_submodule(path, nn.Identity())
    layer.set_submodule(output, DroppedFFN())


def _drop_norms(layer: nn.Module, config: PretrainedConfig, spec: FamilySpec, shape: LayerShape) -> None:
    """Take away the norms that only dropped blocks have; those that come after the sum stay."""
    needed = {spec.attention_out_norm: shape.has_attention, spec.ffn_out_norm: shape.has_ffn}
    if spec.norm_first is None or vars(config)[spec.norm_first]:
        needed[spec.attention_norm] = shape.has_attention
        # Parallel blocks may share one.
        needed[spec.ffn_norm] = needed.get(spec.ffn_norm, False) or shape.has_ffn
    for path, kept in needed.items():
        if path is not None and not kept:
            layer.set_submodule(path, nn.Identity())


def _as_linear(module: nn.Module) -> nn.Module:
    """Return the Linear that computes the same as a Conv1D, whose weight is stored transposed; others as they are."""
    if not isinstance(module, Conv1D):
        return module
    linear = nn.Linear(module.nx, module.nf, device="meta")
    weight = module.weight
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    linear.bias = module.bias
    return linear.train(module.training)


def _resized(linear: Any, out_features: int, in_features: int) -> nn.Module:
    linear = _as_linear(linear)
    if tuple(linear.weight.shape) == (out_features, in_features):
        return linear
    weight = linear.weight
    # Under the meta device nothing is initialised, to_empty allocates only.
    new = nn.Linear(in_features, out_features, linear.bias is not None, device="meta", dtype=weight.dtype)
    new = new.to_empty(device=weight.device) if weight.device.type != "meta" else new
    return new.requires_grad_(weight.requires_grad).train(linear.training)


def _resized_norm(norm: nn.Module, size: tuple[int, ...]) -> nn.Module:
    """Return a norm with a weight of another size; the norm itself where it has that size already."""
    weight: Any = norm.weight
    if tuple(weight.shape) == size:
        return norm
    new = copy.copy(norm)
    # A copy of a module shares its table of parameters.
    new._parameters = {"weight": nn.Parameter(weight.new_ones(size), requires_grad=weight.requires_grad)}
    return new


def _add_bias(linear: Any) -> None:
    if linear.bias is None:
        weight = linear.weight
        linear.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)


def _shape_layers(model: Any, config: Any) -> None:
    """Give the layers of a dense stock model (or decoder of one) the shapes of the config."""
    if config._attn_implementation == "vllm":
        # Nothing here may import vLLM; when it builds a model, it is there.
        config.check_vllm(sys.modules["vllm.distributed"].get_tensor_model_parallel_world_size())
    spec = family_of(config)
    layers = model.get_submodule(spec.layers.rpartition(".")[2])
    for layer_idx, (layer, shape) in enumerate(zip(layers, config.layer_shapes, strict=True)):
        apply_layer_shape(layer, config, spec, layer_idx, shape)
        # Where other buffers are made: vLLM builds parameters on the meta device, but no buffers.
        if shape.has_attention:
            layer.get_submodule(spec.attention).register_indices()
    width = config.layer_shapes[-1].output_size
    if width:
        # Behind the last layer the stream is that of the dense model, and so is its norm.
        model.norm = type(model.norm)(width, eps=dense_config(config).rms_norm_eps)
    model._no_split_modules = {type(layer).__name__ for layer in layers}
    if spec.rope:
        # Scaled RoPE recomputes its frequencies while the model runs, from the dense head_dim.
        model.rotary_emb.config = dense_config(config)
    model.post_init()


@contextmanager
def _stock_build(config: Any) -> Iterator[None]:
    """Let stock code build what ours replaces, at the dense sizes.

    Some stock layers choose their attention module by its name, and do not know that of vLLM.
    """
    attention = config._attn_implementation
    if attention == "vllm":
        config._attn_implementation = "eager"
    try:
        with dense_sizes(config):
            yield
    finally:
        if attention == "vllm":
            config._attn_implementation = attention


class _HoldsLayers(_ModelBase):
    """The class that holds the decoder layers: the stock one, whose layers then get their own shapes."""

    # Stock classes list what old files may hold besides. Ours hold nothing else, and vLLM takes "attn.bias" of GPT-2,
    # once a buffer, for any name with these letters: it would leave out c_attn.bias.
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: Any):
        with _stock_build(config):
            super().__init__(config)
        _shape_layers(self, config)


class _HoldsDecoder(_ModelBase):
    """The class around a decoder that holds the layers."""

    def __init__(self, config: Any):
        # Not the constructor of the stock class, which would build the dense layers first.
        PreTrainedModel.__init__(self, config)
        (_, decoder) = FAMILIES[config.family].class_fields
        setattr(self, decoder, _model_class(config.family, "Decoder")(config))
        self.post_init()


class _HoldsHead(_ModelBase):
    """The class with the language head."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any):
        # The constructor of the stock class knows what else belongs to it. It builds the dense layers as well, here
        # without memory.
        with torch.device("meta"), _stock_build(config):
            super().__init__(config)
        (body, *_) = FAMILIES[config.family].class_fields
        setattr(self, body, _model_class(config.family, "Model")(config))
        # As wide as the embeddings, which may be another width than that of the layers, or as the stream at the end.
        embeddings: Any = self.get_input_embeddings()
        width = config.layer_shapes[-1].output_size or embeddings.embedding_dim
        self.lm_head = nn.Linear(width, config.vocab_size, bias=self.lm_head.bias is not None)
        self.post_init()


class _HoldsTower(_ModelBase):
    """A causal language model around a stock decoder that transformers only has inside of composites."""

    _family: str

    def __init__(self, config: Any):
        # Not the constructor of the class whose head it is, which would build another decoder.
        PreTrainedModel.__init__(self, config)
        decoder: Any = MODEL_MAPPING[stock_config_class(self._family)]
        self.model = decoder(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@cache
def causal_lm_class(family: str) -> type[Any]:
    """Return the causal language model of the dense models of a family: the stock class, if transformers has one.

    Otherwise the decoder of the family with the head, and the forward pass, of the class of another family.
    """
    config, head_of = stock_config_class(family), FAMILIES[family].head_of
    head: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config_class(head_of or family)]
    if head_of is None:
        return head
    name = f"{class_stem(family)}ForCausalLM"
    fields = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{class_stem(family)} with a language head.",
        "config_class": config,
        "_family": family,
    }
    return type(name, (_HoldsTower, head), fields)


@cache
def _model_class(family: str, kind: str) -> type[Any]:
    """Return one of our classes of a family; `kind` is "Model", "Decoder" or "ForCausalLM".

    Only the module of transformers that has this family is imported.
    """
    stock_config = stock_config_class(family)
    head: Any = causal_lm_class(family)
    nested = len(FAMILIES[family].class_fields) > 1
    name = f"{PREFIX}{class_stem(family)}{kind}"
    fields: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{class_stem(family)}{kind} whose layers have their own shapes.",
        "config_class": config_class(family),
        # Of every family: the attention of the layers is ours.
        "_supports_attention_backend": True,
    }
    if getattr(stock_config, "attn_logit_softcapping", None) is not None:
        # Before 5.24 transformers did not say that sdpa leaves the cap of the scores out.
        fields["_supports_sdpa"] = False
    if kind == "ForCausalLM":
        return type(name, (_HoldsHead, head), fields)
    if kind == "Decoder":
        stock: Any = getattr(sys.modules[head.__module__], head.__name__.replace("ForCausalLM", kind))
    else:
        stock = MODEL_MAPPING[stock_config]
        fields["_auto_class"] = "AutoModel"
        if nested:
            return type(name, (_HoldsDecoder, stock), fields)
    if stock._can_record_outputs is not None:
        fields["_can_record_outputs"] = {**stock._can_record_outputs, "attentions": PrunedAttention}
    return type(name, (_HoldsLayers, stock), fields)


class _HoldsText(_ModelBase):
    """A composite class: the stock one, which asks `AutoModel` for the text tower."""

    def __init__(self, config: Any):
        text = type(config.text_config)
        AutoModel.register(text, _model_class(text.family, "Model"), exist_ok=True)
        super().__init__(config)


@cache
def _composite_class(composite: str, kind: str) -> type[Any]:
    """Return one of our classes of a composite model type; `kind` is "Model" or "ForConditionalGeneration".

    Only the module of transformers that has this model type is imported.
    """
    stock_config = stock_config_class(composite)
    mapping: Any = MODEL_MAPPING if kind == "Model" else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    name = f"{PREFIX}{class_stem(composite)}{kind}"
    fields = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{class_stem(composite)}{kind} whose text tower has layers with their own shapes.",
        "config_class": composite_config_class(composite),
        "_auto_class": "AutoModel" if kind == "Model" else "AutoModelForImageTextToText",
    }
    return type(name, (_HoldsText, mapping[stock_config]), fields)


def composite_classes(composite: str) -> tuple[type[Any], type[Any], type[Any]]:
    """Return the config, the model, and the model with a language head of a composite model type."""
    model, head = (_composite_class(composite, kind) for kind in ("Model", "ForConditionalGeneration"))
    return composite_config_class(composite), model, head


def model_classes(family: str) -> tuple[type[Any], type[Any], type[Any]]:
    """Return the config, the model, and the model with a language head of a family."""
    return config_class(family), _model_class(family, "Model"), _model_class(family, "ForCausalLM")


def __getattr__(name: str) -> Any:
    # Checkpoints and pickles name the classes; one is made when it is asked for.
    if name.startswith("__"):
        raise AttributeError(name)
    family, kind = family_of_class(name)
    if family not in FAMILIES:
        return composite_config_class(family) if kind == "Config" else _composite_class(family, kind)
    if kind == "Config":
        return config_class(family)
    if kind == "Decoder" and len(FAMILIES[family].class_fields) == 1:
        raise AttributeError(f"{__name__} has no class {name!r}")
    return _model_class(family, kind)
