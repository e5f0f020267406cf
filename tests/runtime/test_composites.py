"""Composite (vision-language) models: the text tower is pruned, and the whole loads as the composite class again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from intraslice import api
from intraslice.checkpoint.composite import text_name
from intraslice.checkpoint.reader import open_folder
from intraslice.errors import CheckpointError, RecipeError, UnsupportedModelError
from intraslice.exporters.export import export_checkpoint
from intraslice.exporters.options import ExportOptions
from intraslice.inspection import inspect_model
from intraslice.loading import load_model
from intraslice.runtime.configuration_intraslice import known_composites
from support.progress import StopAt
from support.prune import prune, weights_of
from support.tiny_composites import (
    CASES,
    composite_model,
    image_inputs,
    make_composite,
    text_inputs,
    with_new_names,
)


@pytest.fixture(scope="module", params=CASES)
def model_type(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def dense(model_type: str, tmp_path_factory) -> Path:
    return make_composite(model_type, tmp_path_factory.mktemp(model_type) / "dense")


@pytest.fixture(scope="module")
def pruned(dense: Path) -> Path:
    prune(dense, dense.parent / "pruned", sparsity=0.3)
    return dense.parent / "pruned"


@torch.no_grad()
def logits(folder: Path, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()(**inputs).logits


def test_every_composite_of_the_table_is_tested() -> None:
    assert set(CASES) == set(known_composites())


def test_sparsity_zero_is_the_dense_model(model_type: str, dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "out", sparsity=0.0)
    for inputs in (image_inputs(model_type), text_inputs()):
        torch.testing.assert_close(logits(tmp_path / "out", inputs), logits(dense, inputs), rtol=0, atol=1e-5)


def test_the_image_matters(model_type: str, dense: Path, pruned: Path) -> None:
    inputs = image_inputs(model_type)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    for folder in (dense, pruned):
        assert (logits(folder, inputs) - logits(folder, other)).abs().max() > 1e-2


def test_a_pruned_composite_loads_without_the_package(model_type: str, pruned: Path, tmp_path: Path) -> None:
    """In a process that sees the checkpoint and transformers only; sizes and logits are those of the package."""
    given = {"image": image_inputs(model_type), "text": text_inputs()}
    torch.save(given, tmp_path / "given.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(pruned)!r}, trust_remote_code=True).eval()
assert not any(name.split(".")[0] == "intraslice" for name in sys.modules), "the package was imported"
given = torch.load({str(tmp_path / "given.pt")!r})
with torch.no_grad():
    found = {{name: model(**inputs).logits for name, inputs in given.items()}}
torch.save(found, {str(tmp_path / "found.pt")!r})
model.save_pretrained({str(tmp_path / "again")!r})
"""
    # -S -P would also hide transformers; an empty PYTHONPATH hides the package unless it is installed, and then it
    # is not imported, which the process itself checks.
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path, capture_output=True)
    found = torch.load(tmp_path / "found.pt")
    for name, inputs in given.items():
        assert torch.equal(found[name], logits(pruned, inputs))
        # What transformers itself has saved, under its older names, is read too.
        assert torch.equal(logits(tmp_path / "again", inputs), found[name])


def test_the_text_tower_alone_gives_the_logits_of_the_whole(dense: Path, pruned: Path) -> None:
    inputs = text_inputs()
    for folder in (dense, pruned):
        model, _ = load_model(str(folder))
        assert not any("vision" in name for name, _ in model.named_parameters())
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits(folder, inputs))


def test_the_text_tower_alone_can_be_saved(pruned: Path, tmp_path: Path) -> None:
    """Under names of its own, not under those that it had in the composite."""
    model, _ = load_model(str(pruned))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(**text_inputs()).logits
    assert torch.equal(found, logits(pruned, text_inputs()))
    assert all(
        name.startswith(("model.layers", "model.embed", "model.norm", "lm_head")) for name in weights_of(tmp_path)
    )


def test_everything_else_is_carried_over_bit_by_bit(dense: Path, tmp_path: Path) -> None:
    """Also where the pruned tower is saved in another dtype."""
    prune(dense, tmp_path / "out", sparsity=0.3, run__dtype="bfloat16")
    before = {name: tensor for name, tensor in weights_of(dense).items() if text_name(name) is None}
    after = weights_of(tmp_path / "out")
    assert len(before) > 10
    for name, tensor in before.items():
        stored = after[name if name.startswith("model.") else f"model.{name}"]
        assert stored.dtype == tensor.dtype and torch.equal(stored, tensor)
    assert after["model.language_model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16


def test_the_newer_layout_of_names_is_read_too(model_type: str, dense: Path, pruned: Path, tmp_path: Path) -> None:
    folder = with_new_names(make_composite(model_type, tmp_path / "dense"))
    prune(folder, tmp_path / "out", sparsity=0.3)
    expected = weights_of(pruned)
    found = weights_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_interrupted_run_goes_on(dense: Path, pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(dense, tmp_path / "out", sparsity=0.3, progress=StopAt("layers", 2))
    assert not (tmp_path / "out").exists()
    prune(dense, tmp_path / "out", sparsity=0.3, resume=True)
    expected, found = weights_of(pruned), weights_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    prune(dense, tmp_path / "out", sparsity=0.0, overwrite=True)
    assert inspect_model(str(tmp_path / "out")).sparsity == 0.0


def test_another_vision_tower_is_another_model(model_type: str, dense: Path, tmp_path: Path) -> None:
    folder = make_composite(model_type, tmp_path / "dense")
    assert open_folder(folder).fingerprint() == open_folder(dense).fingerprint()
    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in tensors if "vision_tower" in name or "visual" in name)] += 1.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert open_folder(folder).fingerprint() != open_folder(dense).fingerprint()


def test_files_of_the_processor_travel(dense: Path, tmp_path: Path) -> None:
    names = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")
    for name in names:
        (dense / name).write_text("{}")
    prune(dense, tmp_path / "out", sparsity=0.3)
    for name in names:
        assert (tmp_path / "out" / name).is_file()
        (dense / name).unlink()
    assert "AutoModelForImageTextToText, AutoProcessor" in (tmp_path / "out" / "README.md").read_text()


def test_inspect_counts_the_whole(model_type: str, dense: Path, pruned: Path) -> None:
    for folder in (dense, pruned):
        info = inspect_model(str(folder))
        whole = AutoModelForImageTextToText.from_pretrained(folder)
        assert info.composite == model_type
        assert info.family == CASES[model_type]["text_config"]["model_type"]
        assert info.num_parameters == sum(parameter.numel() for parameter in whole.parameters())
    assert inspect_model(str(pruned)).sparsity == pytest.approx(0.3, abs=0.01)


def test_the_other_commands_take_the_text_tower(dense: Path, pruned: Path) -> None:
    for folder in (dense, pruned):
        assert api.evaluate(folder, seqlen=32, windows=2).perplexity > 1
    options = {"calibration.num_samples": 4, "calibration.seqlen": 24, "run.device": "cpu"}
    result = api.prune(
        model=str(dense),
        output=dense.parent / "self",
        sparsity=0.2,
        calibration="self",
        overwrite=True,
        options=options,
    )
    stored = weights_of(dense.parent / "self").values()
    assert result.pruned_parameters == sum(tensor.numel() for tensor in stored if tensor.is_floating_point())


def test_a_padded_export_is_the_text_tower(model_type: str, dense: Path, tmp_path: Path) -> None:
    # Stock classes have one norm of query and key for all heads.
    options = {} if model_type == "mistral3" else {"attention__qk_width": "dense"}
    pruned = tmp_path / "pruned"
    prune(dense, pruned, sparsity=0.3, **options)
    report = export_checkpoint(str(pruned), "padded", tmp_path / "out", ExportOptions())
    assert report.max_logit_difference is not None
    inputs = text_inputs()
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(**inputs).logits
    torch.testing.assert_close(found, logits(pruned, inputs), rtol=0, atol=1e-4)


def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    """The class ties by default, and published configs are silent; transformers looks at the weights."""
    folder = make_composite("mistral3", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    config["text_config"].pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    prune(folder, tmp_path / "out", sparsity=0.0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    for inputs in (image_inputs("mistral3"), text_inputs()):
        torch.testing.assert_close(
            logits(tmp_path / "out", inputs), composite_model("mistral3")(**inputs).logits, rtol=0, atol=1e-5
        )


def test_a_text_tower_may_be_of_another_family(tmp_path: Path) -> None:
    """Mistral Small 3.x: a Mistral tower, or one of Ministral 3 with a temperature of its queries."""
    text = {
        **CASES["mistral3"]["text_config"],
        "model_type": "ministral3",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.7,
        },
    }
    folder = make_composite("mistral3", tmp_path / "dense", text_config=text)
    for sparsity in (0.0, 0.3):
        prune(folder, tmp_path / "out", sparsity=sparsity, overwrite=True)
        model, _ = load_model(str(tmp_path / "out"))
        assert model.config.model_type == "intraslice_ministral3"
        assert torch.equal(model(**text_inputs()).logits, logits(tmp_path / "out", text_inputs()))
        if sparsity == 0.0:
            for inputs in (image_inputs("mistral3"), text_inputs()):
                found = logits(tmp_path / "out", inputs)
                torch.testing.assert_close(found, logits(folder, inputs), rtol=0, atol=1e-5)
    assert inspect_model(str(tmp_path / "out")).sparsity == pytest.approx(0.3, abs=0.01)


# What is refused, in one sentence each.


def changed(
    folder: Path, config: dict[str, Any] | None = None, drop: str = "", add: dict[str, Any] | None = None
) -> Path:
    if config:
        data = json.loads((folder / "config.json").read_text())
        for key, value in config.items():
            section, _, name = key.rpartition(".")
            (data[section] if section else data)[name] = value
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in data.items() if value is not None})
        )
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not drop or drop not in name}
    save_file({**kept, **(add or {})}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"drop": "language_model"}, "without a text tower: no tensor is called 'model.language_model.'"),
        ({"drop": "language_model.model.layers.1."}, "lacks 'model.layers.1."),
        ({"drop": "vision_tower.transformer.layers.1."}, "lacks weights of 'vision_tower': it holds"),
        ({"drop": "multi_modal_projector"}, "lacks weights of 'multi_modal_projector'"),
        ({"add": {"audio_tower.weight": torch.zeros(2)}}, "holds weights of 'audio_tower', which its config.json"),
        ({"add": {"model.language_model.norm.weight": torch.zeros(32)}}, "of its text tower twice"),
        ({"config": {"text_config": None}}, "whose config.json has no text_config"),
        (
            {"config": {"text_config.model_type": "qwen2"}},
            "whose text tower, a qwen2 model, cannot be pruned",
        ),
        ({"config": {"model_type": "idefics3"}}, "of the architecture 'idefics3', whose text tower is a mistral model"),
        ({"config": {"quantization_config": {"quant_method": "fp8"}}}, "is quantised (fp8)"),
        ({"config": {"text_config.quantization_config": {"quant_method": "fp8"}}}, "is quantised (fp8)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{k}-{v}" for k, v in value.items())[:40],
)
def test_what_is_missing_is_said(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = changed(make_composite("mistral3", tmp_path / "dense"), **change)
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        open_folder(folder)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inspect_refuses_an_unknown_text_tower(tmp_path: Path) -> None:
    folder = changed(make_composite("mistral3", tmp_path / "dense"), {"text_config.model_type": "qwen2"})
    with pytest.raises(UnsupportedModelError, match="qwen2 model, cannot be pruned; supported text towers of"):
        inspect_model(str(folder))


def test_a_narrower_residual_stream_does_not_fit_the_other_towers(tmp_path: Path) -> None:
    folder = make_composite("mistral3", tmp_path / "dense")
    options = {"calibration.source": "builtin", "calibration.num_samples": 4, "calibration.seqlen": 24}
    with pytest.raises(RecipeError, match="narrows the residual stream of the text tower"):
        api.prune(model=str(folder), output=tmp_path / "out", sparsity=0.3, method="slicegpt", options=options)


def test_a_pruned_composite_is_not_pruned_again(tmp_path: Path) -> None:
    prune(make_composite("mistral3", tmp_path / "dense"), tmp_path / "out", sparsity=0.3)
    with pytest.raises(UnsupportedModelError, match="already pruned by intraslice"):
        open_folder(tmp_path / "out")
