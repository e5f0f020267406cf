"""The divergence of a site: against the same edit in the stock model, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from intraslice.checkpoint.source import open_checkpoint
from intraslice.layers.decoder import read_ffn
from intraslice.methods.blockwise import divergence_pass
from intraslice.methods.blockwise.layer import solve_ffn, write_solved_ffn
from intraslice.methods.blockwise.measure import ffn_moments
from intraslice.methods.blockwise.options import AllocationOptions, BlockwiseOptions, FFNOptions
from intraslice.placement import Placement
from intraslice.streaming.hidden import Streams, embedded_states
from intraslice.streaming.model import StreamedModel
from intraslice.streaming.propagate import propagate_layer
from support import prune as support
from support.progress import Notes, StopAt
from support.tiny import tiny_model

OPTIONS = BlockwiseOptions(
    allocation=AllocationOptions(rule="divergence"), ffn=FFNOptions(ffn_multiple=4, repair_against="own_output")
)


def _tokens(count: int) -> torch.Tensor:
    return torch.randint(0, 90, (count, 16), generator=torch.Generator().manual_seed(3))


def _streamed(folder: Path) -> StreamedModel:
    placement = Placement.choose("cpu", "auto", torch.float64)
    return StreamedModel(open_checkpoint(str(folder)), placement, (2, 16))


def _folder(tmp_path: Path) -> Path:
    tiny_model("llama", dtype=torch.float64, num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def _measure(folder: Path, tokens: torch.Tensor, boundary_bytes: int = 1 << 20, progress: Notes | None = None):
    return divergence_pass.measure_divergences(
        _streamed(folder),
        tokens,
        0.3,
        OPTIONS,
        boundary_bytes=boundary_bytes,
        save_path=folder.with_suffix(f".{boundary_bytes}"),
        measured="all of it",
        progress=progress or Notes(),
    )


@torch.no_grad()
def test_it_is_that_of_the_stock_model_with_the_same_edit(tmp_path: Path) -> None:
    folder, tokens = _folder(tmp_path), _tokens(8)
    fit, judge = tokens[:6], tokens[6:]
    measured = _measure(folder, tokens).layers[1]["ffn"]
    # The same edit by hand: the FFN of layer 1, fitted to the states that the dense model has there.
    model = _streamed(folder)
    states = embedded_states(model, fit, None)
    propagate_layer(model.load_layer(0), states)
    layer = model.load_layer(1)
    moments = ffn_moments(model, layer, Streams(states, None), layer.attention, OPTIONS.ffn)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = dense(judge).logits.log_softmax(-1)
    for lost, found in measured:
        keep = round((1 - lost) * dense.config.intermediate_size)
        trial = model.load_layer(1)
        weights = read_ffn(trial, trial.shape)
        write_solved_ffn(model, trial, 1, weights, solve_ffn(trial, weights, moments, keep, OPTIONS.ffn)[0])
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        stock.model.layers[1].mlp = trial.ffn
        logits = stock(judge).logits.log_softmax(-1)
        by_hand = (expected.exp() * (expected - logits)).sum(-1).mean()
        # What the head gives is compared in float32.
        torch.testing.assert_close(found, float(by_hand), rtol=1e-3, atol=1e-7)


def test_the_width_of_a_wave_changes_nothing(tmp_path: Path) -> None:
    folder, tokens = _folder(tmp_path), _tokens(8)
    assert _measure(folder, tokens, boundary_bytes=1) == _measure(folder, tokens)


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    folder, tokens = _folder(tmp_path), _tokens(8)
    whole = _measure(folder, tokens, boundary_bytes=1)
    folder.with_suffix(".1").unlink()
    # The first pass is through all layers, then a wave of each layer begins.
    with pytest.raises(KeyboardInterrupt):
        _measure(folder, tokens, boundary_bytes=1, progress=StopAt("divergence of each site", 7))
    assert folder.with_suffix(".1").exists()
    assert _measure(folder, tokens, boundary_bytes=1) == whole


def test_more_is_lost_where_more_goes_and_all_sites_are_there(tmp_path: Path) -> None:
    # All of it is one batch, which has to fit and to judge.
    for layer in _measure(_folder(tmp_path), _tokens(2)).layers:
        assert set(layer) == {"attention", "ffn"}
        for points in layer.values():
            losses, costs = zip(*points, strict=True)
            assert list(losses) == sorted(set(losses)) and 0 < losses[0] and losses[-1] < 1
            assert costs[-1] >= costs[0] > 0


def test_nothing_of_it_is_left_when_a_run_is_finished(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    support.prune(tiny_folder("llama", num_hidden_layers=2), tmp_path / "out", allocation__rule="divergence")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
