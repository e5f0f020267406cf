"""Layers of two factors, and of a sliced residual stream: saved and loaded with and without the package."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from intraslice.runtime.configuration_intraslice import dense_config, dense_shape, pruned_config
from intraslice.runtime.families_intraslice import FAMILIES
from support.processes import AUTO, BLOCK_PACKAGE, LOAD_ALL, SOURCE, check_logits, run_python
from support.tiny_models import dense_config_of, randomise, tokens
from support.tolerances import READ_BACK

FACTORED = ("llama-gqa-biases", "mistral-gqa-window", "qwen2-gqa", "phi3-gqa-partial-rope", "opt", "opt-norm-after")
SLICED = FACTORED[:4]
CASES = [("factors", case) for case in FACTORED] + [("residual", case) for case in SLICED]


def changed_model(kind: str, case: str):
    dense = dense_config_of(case)
    spec = FAMILIES[dense.model_type]
    shape, changes = dense_shape(dense, spec), {}
    if kind == "factors":
        sizes = spec.linear_sizes(shape, dense.hidden_size)
        shape = replace(shape, ranks=tuple((path, 3 + number) for number, path in enumerate(sizes)))
    else:
        shape = replace(shape, shortcuts=True)
        changes = {"hidden_size": 21, "head_dim": shape.qk_head_dim, "tie_word_embeddings": False}
    config = pruned_config(dense, spec, [shape] * 3, method="random", recipe={}, changes=changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("kind,case", CASES)
def test_round_trip_is_exact(kind, case, tmp_path):
    model = changed_model(kind, case)
    spec, shape = FAMILIES[model.config.family], model.config.layer_shapes[0]
    layer = model.get_submodule(spec.layers)[0]
    stored = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    assert stored == spec.num_parameters(shape, model.config.hidden_size)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, **READ_BACK)
    assert loaded.config.layer_shapes == model.config.layer_shapes
    assert type(layer).__name__ in model._no_split_modules
    dense = dense_config_of(case)
    restored = dense_config(loaded.config)
    assert (restored.hidden_size, restored.tie_word_embeddings) == (dense.hidden_size, dense.tie_word_embeddings)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root, expected = tmp_path_factory.mktemp("lowrank"), {}
    (root / "ids.json").write_text(json.dumps(tokens().tolist()))
    for kind, case in (("factors", "phi3-gqa-partial-rope"), ("factors", "opt"), ("residual", "llama-gqa-biases")):
        model = changed_model(kind, case)
        model.save_pretrained(root / f"{kind}-{case}")
        with torch.no_grad():
            expected[f"{kind}-{case}"] = model(tokens()).logits
    return root, expected


def test_clean_process_without_the_package(checkpoints, tmp_path):
    root, expected = checkpoints
    code = LOAD_ALL.format(imports=BLOCK_PACKAGE + AUTO, arguments="trust_remote_code=True")
    modules = json.loads(run_python(code, root, tmp_path, "-I").splitlines()[-1])
    assert all(name.startswith("transformers_modules.") for name in modules.values())
    check_logits(root, expected)


def test_clean_process_with_the_package(checkpoints, tmp_path):
    root, expected = checkpoints
    run_python(
        LOAD_ALL.format(imports=f"import intraslice\n{AUTO}", arguments=""), root, tmp_path, PYTHONPATH=str(SOURCE)
    )
    check_logits(root, expected)


@pytest.mark.parametrize("kind,case", [("factors", "llama-gqa-biases"), ("residual", "llama-gqa-biases")])
def test_such_a_model_can_be_trained(kind, case):
    model = changed_model(kind, case).train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
