"""Norms of narrower heads: the fit against brute force, and the module that comes out against the equation."""

from __future__ import annotations

import copy

import pytest
import torch

from intraslice.algebra import norms
from intraslice.algebra.norms import energy_rows, fit_dropped_energy, fit_energy_weights, norm_correction
from intraslice.layers.decoder import DecoderLayer, read_attention
from intraslice.layers.surgery import write_attention
from intraslice.layers.weights import NormEdit, QKEdit, attention_shape, fuse_qk, kept_channels
from intraslice.runtime.configuration_intraslice import dense_shape
from intraslice.runtime.families_intraslice import FAMILIES
from intraslice.runtime.modeling_intraslice import apply_layer_shape, pair_channels
from support.family_cases import doubles, family_model

EPS = 1e-6
HEADS = (("q", 3), ("k", 2))


def _vectors(num_tokens: int = 4000, heads: int = 2, width: int = 16) -> torch.Tensor:
    """Return vectors whose channels grow and shrink together, as those of real heads do, float64 [N, V, d]."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(num_tokens, heads, 1, generator=generator, dtype=torch.float64).exp()
    own = torch.randn(num_tokens, heads, width, generator=generator, dtype=torch.float64)
    return own * common * torch.linspace(0.5, 2.0, width, dtype=torch.float64)


def _moment(x: torch.Tensor) -> torch.Tensor:
    rows = energy_rows(x, EPS).double()
    return torch.einsum("nvc,nvd->vcd", rows, rows)


def test_the_fit_is_weighted_least_squares():
    x = _vectors()
    kept = torch.zeros(2, 16, dtype=torch.bool)
    kept[0, ::2], kept[1, 5:] = True, True
    a, b = fit_dropped_energy(_moment(x), kept)
    for head in range(2):
        energy = x[:, head].float().square().double()
        stays, goes = energy[:, kept[head]].sum(1), energy[:, ~kept[head]].sum(1)
        weight = 1.0 / (energy.sum(1) + 16 * EPS)
        columns = torch.stack((stays, torch.ones_like(stays)), 1) * weight[:, None]
        found = torch.linalg.lstsq(columns, (goes * weight)[:, None]).solution[:, 0]
        assert (found >= 0).all(), "the case in which nothing is clipped"
        torch.testing.assert_close(a[head], found[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(b[head], found[1], rtol=1e-3, atol=1e-4)


def test_neither_part_of_the_fit_is_negative():
    energy = torch.tensor([[4.0, 1.0], [1.0, 2.0], [2.0, 1.5]]).double()  # what goes falls as what stays grows
    falling = _moment(energy.sqrt()[:, None])
    kept = torch.tensor([[True, False]])
    a, b = fit_dropped_energy(falling, kept)
    assert a == 0 and b > 0
    energy = torch.tensor([[1.0, 0.1], [2.0, 2.0], [3.0, 4.0]]).double()  # a line through a negative offset
    a, b = fit_dropped_energy(_moment(energy.sqrt()[:, None]), kept)
    assert a > 0 and b == 0


def _problem(pairs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return vectors, which channels stay, and the channels that share a weight."""
    x = _vectors()
    groups = torch.arange(16)[:, None] if pairs is None else pairs
    kept = torch.zeros(2, 16, dtype=torch.bool)
    kept[0, groups[2:].flatten()] = True
    kept[1, groups[:-3].flatten()] = True
    return x, kept, groups


@pytest.mark.parametrize("pairs", [None, pair_channels(16, 16)], ids=["channels", "pairs"])
def test_weights_of_energies_are_non_negative_least_squares(pairs, monkeypatch):
    monkeypatch.setattr(norms, "UPDATES", 30_000)
    monkeypatch.setattr(norms, "SPREAD", 1e9)
    x, kept, groups = _problem(pairs)
    w, b = fit_energy_weights(_moment(x), kept, groups, shrinkage=0.0)
    for head in range(2):
        stays = [group for group in groups if kept[head, group[0]]]
        energy = x[:, head].float().square().double()
        weight = 1.0 / (energy.sum(1) + 16 * EPS)
        columns = [energy[:, group].sum(1) for group in stays] + [torch.ones_like(weight)]
        system = torch.stack(columns, 1) * weight[:, None]
        wanted = energy.sum(1) * weight
        found = torch.stack([w[head, group[0]] for group in stays] + [b[head]])
        assert all(w[head, group].unique().numel() == 1 for group in stays)
        # The conditions of Karush, Kuhn and Tucker: no gradient where a weight is positive, none downhill elsewhere.
        gradient = system.T @ (system @ found - wanted) / (system.T @ wanted)
        assert (found >= 0).all() and (gradient > -1e-4).all()
        assert (gradient.abs() * found / found.max() < 1e-4).all()


def test_weights_of_energies_are_pulled_to_what_they_have_in_common():
    x, kept, groups = _problem(None)
    a, _ = fit_dropped_energy(_moment(x), kept)
    free, pulled = (fit_energy_weights(_moment(x), kept, groups, shrinkage=value)[0] for value in (0.0, 1e6))
    torch.testing.assert_close(pulled, (1 + a)[:, None].expand(-1, 16), rtol=1e-4, atol=0)
    assert (free - pulled).abs().max() > 0.1
    # Channels that go keep the common value, so that the product of gain and factor is one number for each head.
    assert (free[~kept] == (1 + a)[:, None].expand(-1, 16)[~kept]).all()
    assert (pulled.max() / pulled.min() < norms.SPREAD**2) and (free > 0).all()


def test_the_corrected_norm_is_much_nearer_on_other_tokens():
    """Pairs are kept for their size, so a plain norm over them takes the vector for larger than it is."""
    fitted, held_out = _vectors().split(2000)
    kept = torch.zeros(2, 16, dtype=torch.bool)
    kept[:, 8:] = True
    a, b = fit_dropped_energy(_moment(fitted), kept)
    common = norm_correction((1 + a)[:, None].expand(-1, 16), b, 8, EPS)
    own = norm_correction(*fit_energy_weights(_moment(fitted), kept, torch.arange(16)[:, None]), 8, EPS)
    dense = (held_out.square().mean(-1, keepdim=True) + EPS).sqrt()
    narrow = held_out[..., 8:]

    def error(gain: torch.Tensor, scale: torch.Tensor) -> float:
        divisor = ((narrow * scale[:, 8:]).square().mean(-1, keepdim=True) + EPS).sqrt()
        return float((divisor / (gain * scale)[:, 8:] / dense - 1).square().mean().sqrt())

    plain = error(torch.ones(2, 16).double(), torch.ones(2, 16).double())
    assert error(*common) < 0.5 * plain
    assert error(*own) < error(*common)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "hunyuan_v1_dense"])
def test_a_narrower_head_divides_by_the_fitted_energy(family):
    """The rows, the gain and the epsilon that are written, against the equation of the algebra."""
    model = family_model(family)
    spec, config = FAMILIES[family], model.config
    layer = copy.deepcopy(model.get_submodule(spec.layers)[0])
    shape = dense_shape(config, spec)
    apply_layer_shape(layer, config, spec, 0, shape)
    block = DecoderLayer(layer, spec, config)
    weights, d = read_attention(block, shape), shape.qk_head_dim
    pairs = pair_channels(d, d)
    # Channels of a pair share a weight: some norms come after RoPE.
    w = {side: torch.linspace(0.5, 2.5, heads * d // 2).double().view(heads, -1).repeat(1, 2) for side, heads in HEADS}
    b = {"q": torch.tensor([0.1, 0.0, 2.0]).double(), "k": torch.tensor([0.3, 0.0]).double()}
    eps = config.rms_norm_eps
    edits = {}
    for side in "qk":
        gain, row_scale = norm_correction(w[side], b[side], d - 4, eps)
        edits[side] = NormEdit(gain=gain, row_scale=row_scale)
    edit = QKEdit(
        heads=(0, 1, 3),
        width=d - 4,
        rope_pairs=torch.stack((torch.arange(d // 2 - 2), torch.arange(2, d // 2))),
        query_norm=edits["q"],
        key_norm=edits["k"],
        norm_offset=spec.norm_offset,
    )
    fused, per_kv = fuse_qk(weights, edit, pairs)
    x = torch.randn(1, 5, config.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    query, key, _ = block.attention.project_rows(x)
    narrow = attention_shape(per_kv, fused, shape.intermediate_size, headed_qk_norm=True)
    write_attention(block, config, 0, narrow, fused, edit.rope_pairs)
    with doubles(), torch.no_grad():
        found = block.attention.norm_query_key(*block.attention.project_rows(x)[:2])
    channels = kept_channels(edit, pairs)
    assert channels is not None and spec.qk_norm is not None
    stock = model.get_submodule(spec.layers)[0].get_submodule(spec.attention)
    dense = {"q": (query, (0, 1, 3), (0, 0, 1)), "k": (key, (0, 1), (0, 1))}
    for side, got in zip("qk", found, strict=True):
        rows, heads, kv = dense[side]
        norm = stock.get_submodule(getattr(spec.qk_norm, side)).weight + spec.norm_offset
        for place, head in enumerate(heads):
            kept = rows[:, :, head][..., channels[kv[place]]]
            weight = w[side][place][channels[kv[place]]]
            energy = (weight * kept.square()).sum(-1, keepdim=True) + b[side][place]
            wanted = kept / (energy / d + eps).sqrt() * norm[channels[kv[place]]]
            torch.testing.assert_close(got[:, :, place], wanted, atol=1e-10, rtol=0)
