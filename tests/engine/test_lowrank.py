"""SVD-LLM and SliceGPT on tiny models, through the same function that the command calls."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from intraslice.checkpoint.source import open_checkpoint
from intraslice.errors import BudgetError, NumericalError, UnsupportedModelError
from intraslice.exporters.export import export_checkpoint
from intraslice.inspection import inspect_model
from intraslice.results.result import PruneResult
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT, dense_config
from intraslice.runtime.families_intraslice import FAMILIES as SPECS
from intraslice.runtime.families_intraslice import LayerShape
from support.progress import Notes, StopAt
from support.prune import calibration, logits, prune
from support.tiny import FAMILIES, VOCAB_SIZE, make_tiny

ROTATED = ("llama", "mistral", "qwen2", "phi3")
CASES = [("svd-llm", family) for family in FAMILIES] + [("slicegpt", family) for family in ROTATED]
# A channel of the residual stream is then less than one percent of the weights.
WIDE = {"hidden_size": 96, "num_hidden_layers": 2}


@pytest.mark.parametrize("method,family", CASES)
def test_the_budget_counts_stored_tensors_and_the_model_runs(method, family, tiny_folder, tmp_path):
    folder, out = tiny_folder(family, **WIDE), tmp_path / "out"
    result = prune(folder, out, method)
    assert abs(result.sparsity - 0.3) <= 0.005
    stored = load_file(out / "model.safetensors")
    in_layers = sum(tensor.numel() for name, tensor in stored.items() if "layers." in name and tensor.dim() == 2)
    assert in_layers == result.pruned_layer_parameters == sum(record.num_parameters for record in result.layers)
    assert sum(tensor.numel() for tensor in stored.values()) == result.pruned_parameters
    assert PruneResult.load(out).to_dict() == result.to_dict()
    assert all(record.errors.keys() == {"attention", "ffn"} for record in result.layers)
    errors = [error for record in result.layers for error in record.errors.values()]
    if method == "slicegpt":
        assert errors.pop() == 0.0  # behind the last layer nothing is sliced
    assert all(0 < error < 1 for error in errors)
    info = inspect_model(str(out))
    assert info.sparsity == pytest.approx(result.sparsity) and info.num_parameters == result.pruned_parameters
    assert (info.dense_hidden_size, info.dense_layer_parameters) == (96, result.dense_layer_parameters)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = calibration().tokens[:2, :12]
    with torch.no_grad():
        whole = model(tokens).logits
        cache = DynamicCache(config=model.config)
        steps = [model(tokens[:, i : i + 4], **{CACHE_ARGUMENT: cache}).logits for i in (0, 4, 8)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 15)
    states = model(tokens, output_hidden_states=True).hidden_states
    assert len(states) == 3 and states[1].shape[-1] == model.config.hidden_size


@pytest.mark.parametrize("method,family", CASES)
def test_sparsity_zero_is_the_identity(method, family, tiny_folder, tmp_path):
    folder, out = tiny_folder(family), tmp_path / "out"
    assert prune(folder, out, method, sparsity=0.0).sparsity == 0.0
    tokens = calibration().tokens[:2]
    # The stock OPT scales queries before the product, our attention after it.
    assert torch.allclose(logits(out, tokens), logits(folder, tokens), atol=1e-5)


@pytest.mark.parametrize("family", ROTATED)
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_of_which_nothing_is_deleted_is_the_dense_model(family, tied, tmp_path, monkeypatch):
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    folder = make_tiny(family, tmp_path / "m", dtype=torch.float64, tie_word_embeddings=tied, **biases)
    monkeypatch.setattr(
        "intraslice.methods.slicegpt.method.slice_width",
        lambda layers, per_channel, channels, hidden_size, sparsity: hidden_size,
    )
    prune(folder, tmp_path / "out", "slicegpt")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert not torch.allclose(stored["model.layers.0.attn_shortcut.weight"], torch.eye(32, dtype=torch.float64))
    tokens = calibration().tokens[:2]
    expected = logits(folder, tokens, dtype=torch.float64)
    # The norms of transformers compute in float32.
    assert torch.allclose(logits(tmp_path / "out", tokens, dtype=torch.float64), expected, atol=1e-5)


def test_only_the_stream_between_the_ends_of_a_sliced_model_is_sliced(tmp_path):
    """Behind the last layer the model has the dense stream, its norm with the dense epsilon, and the dense head."""
    folder = make_tiny("llama", tmp_path / "m", **WIDE)
    prune(folder, tmp_path / "out", "slicegpt")
    model, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", folder))
    width = model.config.hidden_size
    last = model.model.layers[-1]
    assert model.model.embed_tokens.weight.shape[1] == width < 96
    assert (last.mlp.down_proj.out_features, tuple(last.mlp_shortcut.weight.shape)) == (96, (96, width))
    # The matrix beside the last FFN is the basis itself, with orthonormal columns.
    basis = last.mlp_shortcut.weight.double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(width, dtype=torch.float64), atol=1e-6, rtol=0)
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name))
    assert model.model.norm.variance_epsilon == dense.model.norm.variance_epsilon
    assert last.input_layernorm.variance_epsilon > dense.model.norm.variance_epsilon


def test_svd_llm_fits_the_inputs_of_the_dense_model(tmp_path):
    """Brute force, as in the published code: Cholesky factors of the dense model's inputs, in every layer."""
    folder = make_tiny("llama", tmp_path / "m", dtype=torch.float64, **WIDE)
    prune(folder, tmp_path / "out", "svd-llm")
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    inputs: dict[str, list[torch.Tensor]] = {}
    linears = {name: module for name, module in dense.model.layers.named_modules() if _is_linear(module)}
    for name, module in linears.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, 1))
        )
    with torch.no_grad():
        dense(calibration().tokens)
    factored = 0
    for name, linear in linears.items():
        module = pruned.model.layers.get_submodule(name)
        if _is_linear(module):
            continue
        factored += 1
        x, weight = torch.cat(inputs[name]), linear.weight.detach()
        moment = x.T @ x
        # The damping is far below what is compared.
        root = torch.linalg.cholesky(moment + 1e-9 * moment.diagonal().mean() * torch.eye(len(moment)))
        u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
        rank = module.first.out_features
        expected = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)
        found = (module.second.weight @ module.first.weight).detach()
        # What a weight does to inputs that do not occur is not fixed, and the norms compute in float32.
        torch.testing.assert_close(x @ found.T, x @ expected.T, atol=1e-3, rtol=1e-3)
    assert factored >= 10


@pytest.mark.parametrize("method", ["svd-llm", "slicegpt"])
def test_the_saved_model_is_what_the_layers_were_measured_on(method, tmp_path, monkeypatch):
    """The states that the engine has after the last layer are those of the reloaded model."""
    from intraslice.methods.base import Context
    from intraslice.streaming.hidden import HiddenStates

    kept = {}
    original = Context.embedded
    monkeypatch.setattr(Context, "embedded", lambda *args: kept.setdefault("hidden", original(*args)))
    # The engine frees them after the last layer.
    monkeypatch.setattr(HiddenStates, "release", lambda states: None)
    folder = make_tiny("llama", tmp_path / "m", dtype=torch.float64, **WIDE)
    followed = {"factors__measured_on": "pruned_stream"} if method == "svd-llm" else {}
    prune(folder, tmp_path / "out", method, **followed)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    seen = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(calibration().tokens[:2])
    states = kept["hidden"].read(slice(0, 2))
    # The norms of transformers compute in float32.
    assert torch.allclose(seen[0], states, atol=1e-4)


def test_tied_embeddings_become_untied_and_are_counted(tmp_path):
    folder = make_tiny("llama", tmp_path / "m", tie_word_embeddings=True, **WIDE)
    result = prune(folder, tmp_path / "out", "slicegpt")
    config = json.loads((tmp_path / "out/config.json").read_text())
    width = config["hidden_size"]
    norms = 2 * len(result.layers) * width + 96
    assert result.pruned_parameters == result.pruned_layer_parameters + VOCAB_SIZE * (width + 96) + norms
    assert config["tie_word_embeddings"] is False
    assert "stored apart" in (tmp_path / "out/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = dense_config(model.config)
    assert (dense.hidden_size, dense.tie_word_embeddings) == (96, True)
    assert dense.rms_norm_eps == pytest.approx(model.config.rms_norm_eps * width / 96)


@pytest.mark.parametrize("method", ["svd-llm", "slicegpt"])
def test_the_command_line_prunes_inspects_and_plans(method, tiny_folder, tmp_path, capsys):
    from intraslice.cli.app import main

    out = tmp_path / "out"
    arguments = ["prune", str(tiny_folder("llama", **WIDE)), "-o", str(out), "--method", method, "--sparsity", "0.4"]
    arguments += ["--calibration", "builtin", "--set", "calibration.num_samples=2", "--set", "calibration.seqlen=16"]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert plan["target_parameters"] == pytest.approx(result["pruned_parameters"], rel=0.01)
    assert main(["inspect", str(out)]) == 0
    expected = "two factors         14 weights" if method == "svd-llm" else "of 96 channels"
    assert expected in capsys.readouterr().out
    assert main(["export", str(out), "--to", "stock", "-o", str(tmp_path / "stock")]) == 2
    assert "no other runtime knows" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["svd-llm", "slicegpt"])
def test_an_interrupted_run_resumes_with_the_same_bytes(method, tmp_path):
    folder = make_tiny("llama", tmp_path / "m", dtype=torch.bfloat16, **WIDE)
    prune(folder, tmp_path / "whole", method)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, tmp_path / "out", method, progress=StopAt("layers", 0))
    assert not (tmp_path / "out").exists()
    progress = Notes()
    prune(folder, tmp_path / "out", method, resume=True, progress=progress)
    assert any("made again" in note for note in progress.notes) is (method == "slicegpt")
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("method", ["svd-llm", "slicegpt"])
def test_such_a_checkpoint_is_neither_exported_nor_pruned_again(method, tiny_folder, tmp_path):
    out = tmp_path / "out"
    prune(tiny_folder("llama", **WIDE), out, method)
    with pytest.raises(UnsupportedModelError, match="no other runtime knows"):
        export_checkpoint(str(out), "stock", tmp_path / "stock")
    with pytest.raises(UnsupportedModelError, match="already pruned"):
        open_checkpoint(str(out))
    with pytest.raises(ValueError, match="vLLM cannot run"):
        AutoModelForCausalLM.from_pretrained(out).config.check_vllm(1)


@pytest.mark.parametrize("method", ["svd-llm", "slicegpt"])
def test_nan_activations_name_the_layer(method, tmp_path):
    from safetensors.torch import save_file

    folder = make_tiny("llama", tmp_path / "m", **WIDE)
    weights = load_file(folder / "model.safetensors")
    # Finite weights whose products overflow float32 in the FFN of layer 1.
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="layer 1"):
        prune(folder, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()
    # The same command would end in the same way: there is nothing to go on with.
    assert not (tmp_path / "out.partial").exists()


def test_a_stream_too_narrow_for_the_budget_is_refused(tiny_folder, tmp_path):
    with pytest.raises(BudgetError, match=r"32 channels can be sliced only to 0\.\d+; choose a sparsity near that"):
        prune(tiny_folder("llama", num_hidden_layers=1), tmp_path / "out", "slicegpt", sparsity=0.32)
    assert not (tmp_path / "out").exists()


def test_shapes_without_the_new_fields_still_load():
    shape = LayerShape(heads_per_kv=(1, 1), qk_head_dim=4, v_head_dim=4, intermediate_size=8)
    data = shape.to_dict()
    assert data.keys() == {"heads_per_kv", "qk_head_dim", "v_head_dim", "intermediate_size"}
    assert LayerShape.from_dict(data) == shape
    factored = replace(shape, ranks=(("mlp.up_proj", 3),))
    assert LayerShape.from_dict(json.loads(json.dumps(factored.to_dict()))) == factored


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_parameters_are_those_of_the_modules(family):
    from intraslice.runtime.configuration_intraslice import dense_shape
    from support.tiny import tiny_model

    model, spec = tiny_model(family), SPECS[family]
    layer = model.get_submodule(spec.layers)[0]
    sizes = {name: tuple(module.weight.shape) for name, module in layer.named_modules() if _is_linear(module)}
    assert spec.linear_sizes(dense_shape(model.config, spec), 32) == sizes


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


@pytest.mark.parametrize(("layer", "size"), [(0, 96), (1, 3), (1, "wide"), (1, -1)])
def test_a_stream_that_ends_where_it_cannot_is_refused(layer, size, tiny_folder, tmp_path):
    out = tmp_path / "out"
    prune(tiny_folder("llama", **WIDE), out, "slicegpt")
    config = json.loads((out / "config.json").read_text())
    config["intraslice"]["layers"][layer]["output_size"] = size
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=f"layer {layer} .*output_size = {size}"):
        AutoModelForCausalLM.from_pretrained(out)
