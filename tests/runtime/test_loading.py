"""Saving and loading pruned checkpoints: in process, in a clean process, and without the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from intraslice.runtime import RUNTIME_FILES, register
from intraslice.runtime.configuration_intraslice import MIN_TRANSFORMERS, dense_config, dense_shape, pruned_config
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.runtime.modeling_intraslice import PrunedAttention
from support.processes import AUTO, BLOCK_PACKAGE, LOAD_ALL, SOURCE, check_logits, run_python
from support.tiny_models import (
    CASES,
    ONE_PER_FAMILY,
    dense_config_of,
    dense_model,
    pruned_model,
    ragged_shapes,
    tokens,
)
from support.tolerances import READ_BACK


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with one saved model per family, and the logits of each in this process."""
    root = tmp_path_factory.mktemp("checkpoints")
    ids = tokens()
    (root / "ids.json").write_text(json.dumps(ids.tolist()))
    expected = {}
    for case in ONE_PER_FAMILY:
        model = pruned_model(case, torch.float32)
        model.save_pretrained(root / case)
        with torch.no_grad():
            expected[case] = model(ids).logits
    return root, expected


def test_an_older_transformers_is_named(checkpoints, tmp_path):
    root, _ = checkpoints
    code = f"""
import sys
{BLOCK_PACKAGE}
import transformers
transformers.__version__ = "5.15.2"
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/{ONE_PER_FAMILY[0]}", trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    printed = run_python(code, root, tmp_path, "-I")
    assert f"needs transformers {MIN_TRANSFORMERS} or later, 5.15.2 is installed" in printed


def test_the_oldest_transformers_is_that_of_the_package():
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={MIN_TRANSFORMERS}"' in project


def test_clean_process_without_the_package(checkpoints, tmp_path):
    root, expected = checkpoints
    code = LOAD_ALL.format(imports=BLOCK_PACKAGE + AUTO, arguments="trust_remote_code=True")
    modules = json.loads(run_python(code, root, tmp_path, "-I").splitlines()[-1])
    assert all(name.startswith("transformers_modules.") for name in modules.values())
    check_logits(root, expected)


@pytest.mark.parametrize("imports", [f"import intraslice\n{AUTO}", f"{AUTO}\nimport intraslice"])
def test_clean_process_with_the_package_in_either_order(checkpoints, tmp_path, imports):
    root, expected = checkpoints
    code = LOAD_ALL.format(imports=imports, arguments="")
    modules = json.loads(run_python(code, root, tmp_path, PYTHONPATH=str(SOURCE)).splitlines()[-1])
    assert set(modules.values()) == {"intraslice.runtime.modeling_intraslice"}
    check_logits(root, expected)


def test_importing_the_package_imports_neither_torch_nor_transformers(tmp_path):
    code = "import sys, intraslice; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert run_python(code, tmp_path, tmp_path, PYTHONPATH=str(SOURCE)).strip() == "[]"


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case, tmp_path):
    model = pruned_model(case, torch.float32)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, **READ_BACK)
    assert loaded.config.layer_shapes == tuple(ragged_shapes(dense_config_of(case)))


def test_sharded_round_trip(tmp_path):
    model = pruned_model("llama-gqa-biases", torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, **READ_BACK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_device_map(dtype, tmp_path):
    model = pruned_model("llama-gqa-biases", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="cpu")
    assert loaded.dtype == dtype
    assert loaded.model.layers[0].self_attn.rope_index.dtype == torch.int64
    expected, actual = model(tokens()).logits, loaded(tokens()).logits.float()
    # bfloat16 has 8 bits of mantissa, and there are three layers.
    assert (actual - expected).norm() < (1e-6 if dtype == torch.float32 else 0.05) * expected.norm()
    assert loaded.generate(tokens(), max_new_tokens=4, do_sample=False).shape == (2, 17)


def test_base_model_loads_alone(checkpoints):
    root, _ = checkpoints
    base = AutoModel.from_pretrained(root / "llama-gqa-biases")
    assert type(base).__name__ == "IntraSliceLlamaModel"
    assert base(tokens()).last_hidden_state.shape == (2, 13, 32)


def test_config_on_disk(checkpoints):
    root, _ = checkpoints
    saved = json.loads((root / "llama-gqa-biases" / "config.json").read_text())
    shapes = ragged_shapes(dense_config_of("llama-gqa-biases"))
    assert saved["model_type"] == "intraslice_llama"
    assert saved["architectures"] == ["IntraSliceLlamaForCausalLM"]
    assert saved["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert (saved["num_attention_heads"], saved["head_dim"], saved["intermediate_size"]) == (4, 8, 48)
    assert saved["per_layer_config"]["0"] == {
        "num_attention_heads": 3,
        "head_dim": max(shapes[0].qk_head_dim, shapes[0].v_head_dim),
        "intermediate_size": 40,
    }
    assert [LayerShape.from_dict(layer) for layer in saved["intraslice"]["layers"]] == shapes
    assert saved["intraslice"]["method"] == "random" and saved["intraslice"]["recipe"] == {"seed": 0}
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"]
    assert saved["rope_scaling"] is None
    for path in RUNTIME_FILES:
        assert (root / "llama-gqa-biases" / path.name).read_bytes() == path.read_bytes()


def test_scaled_rope_is_written_for_older_readers_too():
    dense = dense_config_of("llama-llama3-rope")
    config = pruned_config(dense, FAMILIES["llama"], ragged_shapes(dense), method="m", recipe={})
    saved = json.loads(config.to_json_string())
    assert saved["rope_scaling"]["rope_type"] == "llama3" and saved["rope_scaling"]["factor"] == 4.0
    assert saved["rope_theta"] == 500.0


@pytest.mark.parametrize("case", CASES)
def test_dense_config_is_the_inverse(case, tmp_path):
    dense = dense_config_of(case)
    spec = FAMILIES[dense.model_type]
    pruned_config(dense, spec, ragged_shapes(dense), method="m", recipe={}).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    back = dense_config(config)
    ignored = ("architectures", "transformers_version", "ignore_keys_at_rope_validation", "_name_or_path")
    expected, actual = ({key: value for key, value in c.to_dict().items() if key not in ignored} for c in (dense, back))
    assert actual == expected
    assert dense_shape(config, spec) == dense_shape(dense, spec)
    assert config.per_layer_config[0].num_attention_heads == ragged_shapes(dense)[0].num_attention_heads


def test_dense_plan_is_the_dense_model(tmp_path):
    model = dense_model("mistral-gqa-window", torch.float32)
    spec = FAMILIES["mistral"]
    shapes = [dense_shape(model.config, spec)] * 3
    config = pruned_config(model.config, spec, shapes, method="m", recipe={})
    same = AutoModelForCausalLM.from_config(config)
    same.load_state_dict(model.state_dict())
    same.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, atol=1e-5, rtol=0)


def test_other_formats_and_contradictions_are_refused(tmp_path):
    dense = dense_config_of("llama-mha")
    config = pruned_config(dense, FAMILIES["llama"], ragged_shapes(dense), method="m", recipe={})
    values = json.loads(config.to_json_string())
    values["intraslice"]["format_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(Exception, match="format version 99 .* version 1, .* install a newer release"):
        AutoConfig.from_pretrained(tmp_path)
    values["intraslice"]["format_version"] = 1
    values["intraslice"]["layers"].pop()
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(Exception, match="shapes of 2 layers"):
        AutoConfig.from_pretrained(tmp_path)


def test_register_again_is_harmless():
    register()
    register()
    assert AutoConfig.for_model("intraslice_opt").model_type == "intraslice_opt"


def test_old_files_written_by_hand_load(checkpoints, tmp_path):
    """A checkpoint made of config, weights and runtime files only, as an exporter writes it."""
    root, expected = checkpoints
    source = root / "phi3-gqa-partial-rope"
    for path in RUNTIME_FILES:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(load_file(source / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(isinstance(module, PrunedAttention) for module in loaded.modules())
    torch.testing.assert_close(loaded(tokens()).logits, expected[source.name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "module",
    [
        "runtime.modeling_intraslice",
        "runtime.configuration_intraslice",
        "layers.decoder",
        "vllm_plugin",
        "layers.weights",
    ],
)
def test_any_module_may_be_imported_first(module):
    """Some of them import transformers, whose end registers classes of a module that is half imported then."""
    code = (
        f"import intraslice.{module}; from transformers import AutoConfig; "
        "print(AutoConfig.for_model('intraslice_llama').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "intraslice_llama", done.stderr
