"""The other methods through the Python interface: budget, identity, what is saved, and their formulas end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intraslice.checkpoint.source import open_checkpoint
from intraslice.data.calibration import Calibration
from intraslice.progress import SilentProgress
from intraslice.results.result import PruneResult
from intraslice.runtime.families_intraslice import FAMILIES
from support import prune as support
from support.progress import StopAt
from support.tolerances import READ_BACK

OTHERS = ("naive", "wanda-sp", "flap", "slimllm", "transact", "modegpt", "sobp", "llm-surgeon", "tyr")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4},
    "opt": {"num_attention_heads": 8, "num_hidden_layers": 4},
}
TOKENS = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(3))
CALIBRATION = Calibration(
    tokens=torch.randint(256, (4, 48), generator=torch.Generator().manual_seed(0)),
    source="random",
    seed=0,
    fingerprint="random",
)


def prune(folder: Path, output: Path, method: str, sparsity: float = 0.3, **options: Any) -> PruneResult:
    return support.prune(folder, output, method, sparsity, on=CALIBRATION, **options)


def load(folder: Path) -> Any:
    return support.load(folder, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    return support.logits(model, TOKENS)


def projections(model: Any, spec: Any, index: int) -> dict[str, Any]:
    layer = model.get_submodule(spec.layers)[index]
    attention = layer.get_submodule(spec.attention)
    mlp = layer.get_submodule(spec.mlp) if spec.mlp else layer
    return {name: attention.get_submodule(getattr(spec, name).path) for name in "qkvo"} | {
        name: mlp.get_submodule(getattr(spec, name).path) for name in ("up", "down")
    }


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", OTHERS)
def test_the_budget_is_met_and_what_is_saved_loads(method, family, tiny_folder, tmp_path):
    # Its errors are those of the last shot, which may find that a site has lost enough.
    more = {"allocation__shots": 1} if method == "llm-surgeon" else {}
    result = prune(tiny_folder(family, **MODELS[family]), tmp_path / "out", method, **more)
    assert abs(result.sparsity - 0.3) <= 0.005
    model = load(tmp_path / "out")
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert stored == result.pruned_parameters
    layers = model.get_submodule(FAMILIES[family].layers)
    weights = sum(p.numel() for name, p in layers.named_parameters() if p.dim() == 2)
    assert weights == result.pruned_layer_parameters
    for record in result.layers:
        # Errors are relative: positive where something was removed, below one unless the block makes it worse.
        whole_attention = (record.shape.num_attention_heads, record.shape.v_head_dim) == (8, 4)
        for error, whole in (
            (record.errors["attention"], whole_attention),
            (record.errors["ffn"], record.shape.intermediate_size == 64),
        ):
            assert abs(error) < 1e-6 if whole else 1e-6 < error < 1.0
    if method in ("transact", "modegpt"):
        assert all(record.heads == tuple(range(8)) for record in result.layers)
        narrower = [record.shape.qk_head_dim < 4 for record in result.layers]
        assert any(narrower) and (all(narrower) or method == "modegpt")
    else:
        assert all(record.shape.v_head_dim == 4 for record in result.layers)
    if method == "slimllm":
        # The layer of the lowest similarity: 0.1875 of four layers.
        whole = [record for record in result.layers if record.shape.intermediate_size == 64]
        assert [record.shape.num_attention_heads for record in whole] == [8]
    if method in ("flap", "slimllm"):
        assert any(record.shape.output_bias for record in result.layers)
    again = tmp_path / "again"
    model.save_pretrained(again)
    torch.testing.assert_close(logits(load(again)), logits(model), **READ_BACK)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", OTHERS)
def test_sparsity_zero_is_the_identity(method, family, tiny_folder, tmp_path):
    folder = tiny_folder(family, **MODELS[family])
    prune(folder, tmp_path / "out", method, 0.0)
    found = load(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(load(folder)), atol=1e-5, rtol=0)
    assert not any(shape.output_bias for shape in found.config.layer_shapes)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", ["wanda-sp", "flap"])
def test_whole_heads_and_channels_are_a_masked_dense_model_with_biases(method, family, tiny_folder, tmp_path):
    """Nothing but biases is repaired, and the biases of the first layer are the means of what was dropped."""
    folder = tiny_folder(family, **MODELS[family])
    result = prune(folder, tmp_path / "out", method)
    pruned, dense, spec = load(tmp_path / "out"), load(folder), FAMILIES[family]
    for index, record in enumerate(result.layers):
        small, full = projections(pruned, spec, index), projections(dense, spec, index)
        rows = [torch.cdist(row[None], full["up"].weight).argmin().item() for row in small["up"].weight]
        masks = {"o": torch.zeros(8, 4), "down": torch.zeros(64)}
        masks["o"][list(record.heads)] = 1.0
        masks["down"][rows] = 1.0
        for name, mask in masks.items():
            torch.testing.assert_close(small[name].weight, full[name].weight[:, mask.flatten() > 0])
            with torch.no_grad():
                full[name].weight *= mask.flatten()
            if small[name].bias is not None:
                full[name].bias = torch.nn.Parameter(small[name].bias.detach().clone())
    torch.testing.assert_close(logits(pruned), logits(dense), atol=1e-5, rtol=0)


def test_flap_repairs_the_mean_of_the_first_block(tiny_folder, tmp_path):
    folder = tiny_folder("llama", **MODELS["llama"])
    result = prune(folder, tmp_path / "out", "flap", allocation__rule="uniform")
    dense, inputs = load(folder), []
    o = dense.model.layers[0].self_attn.o_proj
    o.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        dense(CALIBRATION.tokens)
    dropped = torch.ones(8, 4)
    dropped[list(result.layers[0].heads)] = 0.0
    assert 0 < dropped.sum() < 32
    context = torch.cat(inputs)
    expected = (context.mean(0) * dropped.flatten()) @ o.weight.T
    torch.testing.assert_close(load(tmp_path / "out").model.layers[0].self_attn.o_proj.bias, expected)
    # What the record calls the error: energy of the difference over energy of the dense output.
    wanted = context @ o.weight.T
    missing = wanted - ((context * (1 - dropped.flatten())) @ o.weight.T + expected)
    relative = (missing.square().sum() / wanted.square().sum()).item()
    assert result.layers[0].errors["attention"] == pytest.approx(relative, rel=1e-4)


def test_flap_takes_means_and_variances_of_the_dense_model_in_every_layer(tiny_folder, tmp_path):
    folder = tiny_folder("llama", **MODELS["llama"])
    result = prune(folder, tmp_path / "out", "flap")
    dense, pruned = load(folder), load(tmp_path / "out")
    taps: dict[str, torch.Tensor] = {}
    for name in (f"{index}.{path}" for index in range(4) for path in ("self_attn.o_proj", "mlp.down_proj")):
        dense.model.layers.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: taps.__setitem__(name, args[0].detach().flatten(0, 1))
        )
    support.logits(dense, CALIBRATION.tokens)
    cut = 0
    for index, record in enumerate(result.layers):
        small, full = (projections(model, FAMILIES["llama"], index) for model in (pruned, dense))
        kept = {"down": [torch.cdist(row[None], full["up"].weight).argmin().item() for row in small["up"].weight]}
        kept["o"] = [head * 4 + i for head in record.heads for i in range(4)]
        for name, path in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
            x, weight = taps[f"{index}.{path}"], full[name].weight.detach()
            gone = [channel for channel in range(x.shape[1]) if channel not in kept[name]]
            if small[name].bias is not None:
                torch.testing.assert_close(
                    small[name].bias.detach(), x[:, gone].mean(0) @ weight[:, gone].T, atol=1e-5, rtol=1e-4
                )
            if name == "down" and gone:
                cut += 1
                scores = x.var(0, correction=0) * weight.square().sum(0)
                assert scores[gone].max() <= scores[kept[name]].min() * (1 + 1e-5)
    assert cut >= 2


def test_wanda_looks_at_both_sites_of_a_layer_before_it_prunes_either(tiny_folder, tmp_path):
    folder = tiny_folder("llama", **MODELS["llama"])
    result = prune(folder, tmp_path / "out", "wanda-sp")
    dense, pruned = load(folder), load(tmp_path / "out")
    inputs: list[tuple[Any, Any]] = []
    for layer in pruned.model.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    acts: list[torch.Tensor] = []
    for layer in dense.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: acts.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        pruned(CALIBRATION.tokens, use_cache=False)
        for layer, (args, kwargs) in zip(dense.model.layers, inputs, strict=True):
            layer(*args, **kwargs)
    for index, (act, record) in enumerate(zip(acts, result.layers, strict=True)):
        small, full = (projections(model, FAMILIES["llama"], index) for model in (pruned, dense))
        kept = [torch.cdist(row[None], full["up"].weight).argmin().item() for row in small["up"].weight]
        scores = (full["down"].weight.abs() * act.norm(dim=0)).mean(0).detach()
        gone = [channel for channel in range(64) if channel not in kept]
        assert gone and scores[gone].max() <= scores[kept].min() * (1 + 1e-5)
        # int(0.3 * 4) kv heads go, with both of their query heads.
        assert record.shape.heads_per_kv == (2, 2, 2)


def test_modegpt_keeps_the_best_product_of_value_and_output_weights(tiny_folder, tmp_path):
    """Type III in the first layer: each kv head's values times the output weights that read them, of half the rank."""
    folder = tiny_folder("llama", **MODELS["llama"])
    prune(folder, tmp_path / "out", "modegpt", sparsity=0.5, allocation__rule="uniform")
    dense, pruned, inputs = load(folder), load(tmp_path / "out"), []
    dense.model.layers[0].self_attn.v_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, 1))
    )
    support.logits(dense, CALIBRATION.tokens)
    x, width = torch.cat(inputs).double(), pruned.config.layer_shapes[0].v_head_dim
    assert width == 2
    for kv in range(4):
        products = []
        for model, size in ((dense, 4), (pruned, width)):
            attention = model.model.layers[0].self_attn
            values = x @ attention.v_proj.weight.detach().double()[kv * size : (kv + 1) * size].T
            heads = attention.o_proj.weight.detach().double().view(32, 8, size)[:, 2 * kv : 2 * kv + 2]
            products.append(torch.einsum("nd,khd->nhk", values, heads).flatten(1))
        u, s, v = torch.linalg.svd(products[0], full_matrices=False)
        # float32 weights.
        torch.testing.assert_close(products[1], (u[:, :width] * s[:width]) @ v[:width], atol=1e-3, rtol=1e-3)


def test_transact_keeps_rows_of_every_head(tiny_folder, tmp_path):
    folder = tiny_folder("opt", num_attention_heads=4, num_hidden_layers=2)
    prune(folder, tmp_path / "out", "transact")
    pruned, dense, spec = load(tmp_path / "out"), load(folder), FAMILIES["opt"]
    for index in range(2):
        small, full = projections(pruned, spec, index), projections(dense, spec, index)
        width = pruned.config.layer_shapes[index].qk_head_dim
        for name in "qkv":
            heads = zip(small[name].weight.view(4, width, -1), full[name].weight.view(4, 8, -1), strict=True)
            for part, whole in heads:
                kept = torch.cdist(part, whole).min(1)
                assert kept.values.max() < 1e-6 and kept.indices.unique().numel() == width
        assert torch.equal(small["o"].bias, full["o"].bias)


@pytest.mark.parametrize("method", ["flap", "sobp"])
def test_an_interrupted_run_resumes_with_the_same_result(method, tiny_folder, tmp_path):
    folder = tiny_folder("llama", **MODELS["llama"])
    prune(folder, tmp_path / "whole", method, run__hidden_states="disk")
    with pytest.raises(KeyboardInterrupt):
        prune(folder, tmp_path / "out", method, progress=StopAt("layers", 1), run__hidden_states="disk")
    prune(folder, tmp_path / "out", method, resume=True, run__hidden_states="disk")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_the_forward_pass_measures_what_the_whole_model_shows(tiny_folder):
    from intraslice.methods.blockwise.profile_pass import profile_layers
    from intraslice.placement import Placement
    from intraslice.streaming.hidden import embedded_states
    from intraslice.streaming.model import StreamedModel

    folder = tiny_folder("opt", **MODELS["opt"])
    model = StreamedModel(open_checkpoint(str(folder)), Placement.choose("cpu", "auto", torch.float32), (1, 20))
    profile = profile_layers(model, embedded_states(model, TOKENS, None), SilentProgress())
    dense, spec = load(folder), FAMILIES["opt"]
    taps: dict[str, torch.Tensor] = {}
    for index in range(4):
        for name, linear in projections(dense, spec, index).items():
            linear.register_forward_pre_hook(
                lambda module, args, key=f"{name}{index}": taps.__setitem__(key, args[0].reshape(40, -1))
            )
    states = []
    for layer in dense.get_submodule(spec.layers):
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    logits(dense)
    for index in range(4):
        linears, fluctuation = projections(dense, spec, index), profile.fluctuation[index]
        for name, found in (("o", fluctuation["attention"]), ("down", fluctuation["ffn"])):
            expected = taps[f"{name}{index}"].var(0, correction=0) * linears[name].weight.square().sum(0)
            torch.testing.assert_close(found.flatten().float(), expected, rtol=1e-3, atol=1e-6)
        cosine = torch.nn.functional.cosine_similarity(states[2 * index], states[2 * index + 1], dim=-1).mean()
        assert profile.similarity[index] == pytest.approx(float(cosine), abs=1e-5)
