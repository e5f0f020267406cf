"""LLM-Surgeon: costs against autograd on the stock model, and shots against one prune after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from intraslice.errors import CheckpointError
from intraslice.methods.blockwise.allocators.base import count_units
from intraslice.methods.blockwise.allocators.curvature import allocate_by_curvature
from intraslice.methods.blockwise.curvature_pass import OUTPUTS_FILE, units_to_remove
from intraslice.methods.blockwise.options import AllocationOptions
from intraslice.methods.blockwise.scores import removal_costs, without_channels
from support import prune as support
from support.model_sites import sites
from support.progress import Notes, StopAt

SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
DAMPING = 0.01
"""Of the preset."""


def projections(model: Any) -> list[dict[str, torch.nn.Linear]]:
    return [{"attention": layer.self_attn.o_proj, "ffn": layer.mlp.down_proj} for layer in model.model.layers]


def curvature_of(model: Any, tokens: torch.Tensor) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Return the second moments of inputs and of gradients at outputs of each projection, by autograd, float64."""
    inputs: dict[Any, torch.Tensor] = {}
    outputs: dict[Any, torch.Tensor] = {}

    def watch(linear: Any, given: Any, output: torch.Tensor) -> None:
        inputs[linear], outputs[linear] = given[0], output
        output.retain_grad()

    hooks = [linear.register_forward_hook(watch) for layer in projections(model) for linear in layer.values()]
    # Sequences of one length: the mean over all is the mean of the means.
    loss = model(tokens, labels=tokens).loss * len(tokens)
    loss.backward()
    for hook in hooks:
        hook.remove()

    def moment(values: torch.Tensor | None) -> torch.Tensor:
        assert values is not None
        rows = values.detach().flatten(0, 1).double()
        return rows.T @ rows

    return [
        {name: (moment(inputs[linear]), moment(outputs[linear].grad)) for name, linear in layer.items()}
        for layer in projections(model)
    ]


def costs_of(model: Any, tokens: torch.Tensor) -> list[dict[str, tuple[float, ...]]]:
    units = {"attention": 8, "ffn": 64}
    curvature = curvature_of(model, tokens)
    return [
        {
            name: tuple(removal_costs(*curvature[i][name], linear.weight.detach(), units[name], DAMPING).tolist())
            for name, linear in layer.items()
        }
        for i, layer in enumerate(projections(model))
    ]


def channels_of(pruned: Any, dense: Any) -> list[int]:
    """Return the dense channels of the rows of an FFN."""
    return [torch.cdist(row[None], dense.up_proj.weight).argmin().item() for row in pruned.up_proj.weight]


@pytest.mark.parametrize("boundary_bytes", [1, 1 << 20])
def test_one_shot_removes_what_costs_least_and_lets_the_others_make_up_for_it(
    boundary_bytes: int, tiny_folder: Callable[..., Path], tmp_path: Path
):
    folder, on = tiny_folder("llama", **SIZES), support.calibration(4, 24)
    result = support.prune(
        folder, tmp_path / "out", "llm-surgeon", on=on, allocation__shots=1, run__boundary_bytes=boundary_bytes
    )
    assert abs(result.sparsity - 0.3) < 0.005
    dense, pruned = support.load(folder), support.load(tmp_path / "out")
    costs, curvature = costs_of(dense, on.tokens), curvature_of(dense, on.tokens)
    dearest_gone, cheapest_kept = 0.0, float("inf")
    for index, record in enumerate(result.layers):
        of_heads, of_channels = (torch.tensor(costs[index][name]) for name in ("attention", "ffn"))
        kept = channels_of(pruned.model.layers[index].mlp, dense.model.layers[index].mlp)
        assert sorted(of_heads.topk(len(record.heads)).indices.tolist()) == list(record.heads)
        assert sorted(of_channels.topk(len(kept)).indices.tolist()) == kept
        gone = torch.ones(64, dtype=torch.bool)
        gone[kept] = False
        weight = dense.model.layers[index].mlp.down_proj.weight.detach()
        moment = curvature[index]["ffn"][0]
        # The repair damps relative to the channels that stay, not to all of them.
        damping = DAMPING * float(moment.diagonal()[kept].mean() / moment.diagonal().mean())
        expected = without_channels(moment, weight, gone, damping)[:, kept].float()
        found = pruned.model.layers[index].mlp.down_proj.weight
        assert (found - expected).norm() < 1e-3 * (expected - weight[:, kept]).norm()
        dearest_gone = max(dearest_gone, float(of_channels[gone].max()))
        cheapest_kept = min(cheapest_kept, float(of_channels[kept].min()))
    # One threshold for all layers; heads are whole, so that FFNs of their layers may take some channels more or less.
    spread = torch.tensor([cost for layer in costs for cost in layer["ffn"]]).sort().values
    between = ((spread > cheapest_kept) & (spread < dearest_gone)).sum()
    assert between < 0.15 * len(spread)


def after_a_shot(folder: Path, target: Path, tokens: torch.Tensor, share: float) -> int:
    """Write the model with zeros in what a shot removes, and with the others made up for it; return how much that is.

    Args:
        folder: the dense model.
        target: where it goes.
        tokens: calibration tokens.
        share: of a sparsity of 0.3.
    """
    removed = 0
    model = support.load(folder)
    costs, curvature = costs_of(model, tokens), curvature_of(model, tokens)
    options = AllocationOptions(budget_unit="units", max_site_sparsity=0.99)
    units = count_units(sites([3072] * 3, [6144] * 3, heads=8, kv_heads=4, channels=64), 0.3, options)
    keep = allocate_by_curvature(costs, units.sites, share * units.sparsity, options).keep
    for index, layer in enumerate(projections(model)):
        for name, linear in layer.items():
            weight = linear.weight.detach()
            gone = units_to_remove(costs[index][name], keep[index][name], weight)
            channels = gone.repeat_interleave(weight.shape[1] // len(gone))
            linear.weight.data = without_channels(curvature[index][name][0], weight, channels, DAMPING).float()
            removed += int(channels.sum())
    model.save_pretrained(target)
    return removed


def test_two_shots_are_one_after_the_other(tiny_folder: Callable[..., Path], tmp_path: Path):
    folder, on = tiny_folder("llama", **SIZES), support.calibration(4, 24)
    result = support.prune(folder, tmp_path / "two", "llm-surgeon", on=on, allocation__shots=2)
    assert abs(result.sparsity - 0.3) < 0.005
    assert not list(tmp_path.glob("*.partial"))
    assert after_a_shot(folder, tmp_path / "half", on.tokens, 0.5) > 20
    support.prune(tmp_path / "half", tmp_path / "rest", "llm-surgeon", on=on, allocation__shots=1)
    support.prune(folder, tmp_path / "one", "llm-surgeon", on=on, allocation__shots=1)
    two, rest, one = (support.logits(tmp_path / name, on.tokens) for name in ("two", "rest", "one"))
    # What autograd and the streamed pass round differently goes through two inversions of damped moments.
    torch.testing.assert_close(two, rest, atol=2e-3, rtol=2e-3)
    assert (two - one).abs().max() > 0.1


SMALL: dict[str, Any] = {"num_attention_heads": 8, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def whole(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a run of three shots makes when it is not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    support.prune(tiny_folder("opt", **SMALL), out, "llm-surgeon", allocation__shots=3)
    return out


@pytest.mark.parametrize("stopped_at", ["removal, shot 2 of 3", "layers"])
def test_an_interrupted_run_goes_on_with_the_shots_that_it_has_fired(
    stopped_at: str, whole: Path, tiny_folder: Callable[..., Path], tmp_path: Path
):
    folder, out = tiny_folder("opt", **SMALL), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        support.prune(folder, out, "llm-surgeon", allocation__shots=3, progress=StopAt(stopped_at, 0))
    # It would stop at a shot that is fired twice.
    fired = StopAt("curvature, shot 1 of 3", 0)
    support.prune(folder, out, "llm-surgeon", allocation__shots=3, resume=True, progress=fired)
    expected, resumed = (support.weights_of(path) for path in (whole, out))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("stopped_at", ["costs, shot 2 of 3", "layers"])
def test_damaged_shots_are_fired_again_or_refused(
    stopped_at: str, whole: Path, tiny_folder: Callable[..., Path], tmp_path: Path
):
    folder, out, notes = tiny_folder("opt", **SMALL), tmp_path / "out", Notes()
    with pytest.raises(KeyboardInterrupt):
        support.prune(folder, out, "llm-surgeon", allocation__shots=3, progress=StopAt(stopped_at, 0))
    path = tmp_path / "out.partial" / OUTPUTS_FILE
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    if stopped_at == "layers":
        with pytest.raises(CheckpointError, match="outputs.safetensors' is not what was written; pass --overwrite"):
            support.prune(folder, out, "llm-surgeon", allocation__shots=3, resume=True)
        return
    support.prune(folder, out, "llm-surgeon", allocation__shots=3, resume=True, progress=notes)
    assert any("is not what was written; the shots are fired again" in note for note in notes.notes)
    assert torch.equal(*(support.logits(path, support.calibration(2).tokens) for path in (out, whole)))
