"""SVD-LLM and SliceGPT on tiny models, through the same function that the command calls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import intraslice  # noqa: F401 - registers the pruned classes
from intraslice.checkpoint.source import open_checkpoint
from intraslice.data.calibration import Calibration
from intraslice.engine.run import prune_checkpoint
from intraslice.errors import BudgetError, NumericalError, UnsupportedModelError
from intraslice.exporters.export import export_checkpoint
from intraslice.inspection import inspect_model
from intraslice.methods.blockwise.options import MethodOptions
from intraslice.options import RunOptions
from intraslice.progress import SilentProgress
from intraslice.results.result import PruneResult
from intraslice.runtime.configuration_intraslice import FAMILIES as SPECS
from intraslice.runtime.configuration_intraslice import LayerShape, dense_config
from tiny import FAMILIES, VOCAB_SIZE, make_tiny

ROTATED = ("llama", "mistral", "qwen2", "phi3")
CASES = [("factors", family) for family in FAMILIES] + [("residual", family) for family in ROTATED]
# A channel of the residual stream is then less than one percent of the weights.
WIDE = {"hidden_size": 96, "num_hidden_layers": 2}


def calibration(num: int = 8, seqlen: int = 32) -> Calibration:
    tokens = torch.randint(0, VOCAB_SIZE, (num, seqlen), generator=torch.Generator().manual_seed(0))
    return Calibration(tokens=tokens, source="random", seed=0, fingerprint="random")


def run(folder: Path, output: Path, architecture: str, sparsity: float = 0.3, **changes) -> PruneResult:
    return prune_checkpoint(
        open_checkpoint(str(folder)),
        calibration(),
        method=MethodOptions(sparsity=sparsity, architecture=architecture),  # type: ignore[arg-type]
        run=RunOptions(batch_tokens=64),
        output=output,
        overwrite=changes.pop("overwrite", False),
        resume=changes.pop("resume", False),
        method_name={"factors": "svd-llm", "residual": "slicegpt"}[architecture],
        recipe={},
        command="test",
        progress=changes.pop("progress", SilentProgress()),
    )


def logits(folder: Path, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()(tokens).logits


@pytest.mark.parametrize("architecture,family", CASES)
def test_the_budget_counts_stored_tensors_and_the_model_runs(architecture, family, tiny_folder, tmp_path):
    folder, out = tiny_folder(family, **WIDE), tmp_path / "out"
    result = run(folder, out, architecture)
    assert abs(result.sparsity - 0.3) <= 0.005
    stored = load_file(out / "model.safetensors")
    in_layers = sum(tensor.numel() for name, tensor in stored.items() if "layers." in name and tensor.dim() == 2)
    assert in_layers == result.pruned_layer_parameters == sum(record.num_parameters for record in result.layers)
    assert sum(tensor.numel() for tensor in stored.values()) == result.pruned_parameters
    assert PruneResult.load(out).to_dict() == result.to_dict()
    assert all(0 < record.attention_error < 1 and 0 < record.ffn_error < 1 for record in result.layers)
    info = inspect_model(str(out))
    assert info.sparsity == pytest.approx(result.sparsity) and info.num_parameters == result.pruned_parameters
    assert (info.dense_hidden_size, info.dense_layer_parameters) == (96, result.dense_layer_parameters)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = calibration().tokens[:2, :12]
    with torch.no_grad():
        whole = model(tokens).logits
        cache = DynamicCache(config=model.config)
        steps = [model(tokens[:, i : i + 4], past_key_values=cache).logits for i in (0, 4, 8)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 15)
    states = model(tokens, output_hidden_states=True).hidden_states
    assert len(states) == 3 and states[1].shape[-1] == model.config.hidden_size


@pytest.mark.parametrize("architecture,family", CASES)
def test_sparsity_zero_is_the_identity(architecture, family, tiny_folder, tmp_path):
    folder, out = tiny_folder(family), tmp_path / "out"
    assert run(folder, out, architecture, sparsity=0.0).sparsity == 0.0
    tokens = calibration().tokens[:2]
    # The stock OPT scales queries before the product, our attention after it.
    assert torch.allclose(logits(out, tokens), logits(folder, tokens), atol=1e-5)


@pytest.mark.parametrize("family", ROTATED)
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_of_which_nothing_is_deleted_is_the_dense_model(family, tied, tmp_path, monkeypatch):
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    folder = make_tiny(family, tmp_path / "m", dtype=torch.float64, tie_word_embeddings=tied, **biases)
    monkeypatch.setattr(
        "intraslice.methods.slicegpt.method.slice_width", lambda per_channel, hidden_size, sparsity: hidden_size
    )
    run(folder, tmp_path / "out", "residual")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert not torch.allclose(stored["model.layers.0.attn_shortcut.weight"], torch.eye(32, dtype=torch.float64))
    tokens = calibration().tokens[:2]
    expected = logits(folder, tokens, dtype=torch.float64)
    # The norms of transformers compute in float32.
    assert torch.allclose(logits(tmp_path / "out", tokens, dtype=torch.float64), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ["factors", "residual"])
def test_the_saved_model_is_what_the_layers_were_measured_on(architecture, tmp_path, monkeypatch):
    """The states that the engine has after the last layer are those of the reloaded model (rotated back)."""
    from intraslice.engine import run as engine

    kept = {}
    original = engine._embedded
    monkeypatch.setattr(engine, "_embedded", lambda *args: kept.setdefault("hidden", original(*args)))
    rest = engine.rotate_rest
    monkeypatch.setattr(engine, "rotate_rest", lambda *args: rest(*args[:2], kept.setdefault("bases", args[2])))
    folder = make_tiny("llama", tmp_path / "m", dtype=torch.float64, **WIDE)
    run(folder, tmp_path / "out", architecture)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    seen = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(calibration().tokens[:2])
    states = kept["hidden"].read(slice(0, 2))
    if architecture == "residual":
        states = states @ kept["bases"][1]
    # The norms of transformers compute in float32.
    assert torch.allclose(seen[0], states, atol=1e-4)


def test_tied_embeddings_become_untied_and_are_counted(tmp_path):
    folder = make_tiny("llama", tmp_path / "m", tie_word_embeddings=True, **WIDE)
    result = run(folder, tmp_path / "out", "residual")
    config = json.loads((tmp_path / "out/config.json").read_text())
    width = config["hidden_size"]
    norms = (2 * len(result.layers) + 1) * width
    assert result.pruned_parameters == result.pruned_layer_parameters + 2 * VOCAB_SIZE * width + norms
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
    arguments += ["--set", "calibration.num_samples=2", "--set", "calibration.seqlen=16"]
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


class _StopAfter(SilentProgress):
    """Interrupts the run like Ctrl-C when so many layers are done; keeps the notes."""

    def __init__(self, layers: int = -1) -> None:
        self.left = layers
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def step(self, description: str, total: int):
        from contextlib import contextmanager

        @contextmanager
        def stepping():
            def advance(units: int) -> None:
                self.left -= units
                if self.left == 0:
                    raise KeyboardInterrupt

            yield advance

        return stepping()


@pytest.mark.parametrize("architecture", ["factors", "residual"])
def test_an_interrupted_run_resumes_with_the_same_bytes(architecture, tmp_path):
    folder = make_tiny("llama", tmp_path / "m", dtype=torch.bfloat16, **WIDE)
    run(folder, tmp_path / "whole", architecture)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", architecture, progress=_StopAfter(1))
    assert not (tmp_path / "out").exists()
    progress = _StopAfter()
    run(folder, tmp_path / "out", architecture, resume=True, progress=progress)
    assert any("made again" in note for note in progress.notes) is (architecture == "residual")
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("architecture", ["factors", "residual"])
def test_such_a_checkpoint_is_neither_exported_nor_pruned_again(architecture, tiny_folder, tmp_path):
    out = tmp_path / "out"
    run(tiny_folder("llama", **WIDE), out, architecture)
    with pytest.raises(UnsupportedModelError, match="no other runtime knows"):
        export_checkpoint(str(out), "stock", tmp_path / "stock")
    with pytest.raises(UnsupportedModelError, match="already pruned"):
        open_checkpoint(str(out))
    with pytest.raises(ValueError, match="vLLM cannot run"):
        AutoModelForCausalLM.from_pretrained(out).config.check_vllm(1)


@pytest.mark.parametrize("architecture", ["factors", "residual"])
def test_nan_activations_name_the_layer(architecture, tmp_path):
    from safetensors.torch import save_file

    folder = make_tiny("llama", tmp_path / "m", **WIDE)
    weights = load_file(folder / "model.safetensors")
    # Finite weights whose products overflow float32 in the FFN of layer 1.
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="layer 1"):
        run(folder, tmp_path / "out", architecture)
    assert not (tmp_path / "out").exists()
    # A finished layer is work worth keeping, also where no allocation came before it.
    assert (tmp_path / "out.partial/layers/00000.safetensors").exists()


def test_a_stream_too_narrow_for_the_budget_is_refused(tiny_folder, tmp_path):
    with pytest.raises(BudgetError, match=r"32 channels can be sliced only to 0\.\d+; choose a sparsity near that"):
        run(tiny_folder("llama", num_hidden_layers=1), tmp_path / "out", "residual", sparsity=0.31)
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
    from tiny import tiny_model

    model, spec = tiny_model(family), SPECS[family]
    layer = model.get_submodule(spec.layers)[0]
    sizes = {name: tuple(module.weight.shape) for name, module in layer.named_modules() if _is_linear(module)}
    assert spec.linear_sizes(dense_shape(model.config, spec), 32) == sizes


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)
