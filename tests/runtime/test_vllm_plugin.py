"""What vLLM needs from the runtime files and the plug-in, without vLLM; scripts/check_vllm.sh runs the real one."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
import textwrap
from copy import deepcopy
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intraslice import vllm_plugin
from intraslice.runtime.configuration_intraslice import (
    class_stem,
    dense_shape,
    dense_shapes,
    known_families,
    pruned_config,
)
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.runtime.modeling_intraslice import DroppedAttention, PrunedAttention
from support.family_cases import CASES, KNOWN_CASES, doubles, family_config, spec_of
from support.tiny_models import ONE_PER_FAMILY, dense_config_of, pruned_model, randomise, tokens


class Registry(dict):
    def register_model(self, name: str, model: str) -> None:
        self[name] = model


@pytest.fixture
def vllm(monkeypatch):
    """A module that records what is registered, and says that layers are not split."""
    fake: Any = ModuleType("vllm")
    fake.__version__ = "0.32.0"
    fake.ModelRegistry = Registry()
    fake.checks = {}
    fake.tensor_parallel_size = 1
    fake.calls = []
    parts: dict[str, dict[str, Any]] = {
        "vllm.distributed": {"get_tensor_model_parallel_world_size": lambda: fake.tensor_parallel_size},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": fake.checks},
    }
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        # As vLLM: the width of the cache, no mask, [tokens, heads * width] out.
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] == module.attn.head_size
        assert (query.shape[1], key.shape[1]) == (module.num_heads, module.num_kv_heads)
        fake.calls.append(module.layer_idx)
        group, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.mT * scaling
        # It takes window and cap from the config.
        if module.attn_logit_softcapping is not None:
            scores = module.attn_logit_softcapping * (scores / module.attn_logit_softcapping).tanh()
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (module.sliding_window or length))
        context = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        return context.transpose(1, 2).reshape(query.shape[2], -1), None

    ALL_ATTENTION_FUNCTIONS.register("vllm", attend)
    yield fake
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("vllm", None)


def even_config(case: str, heads_per_kv: tuple[int, ...] | None = None):
    """Config of three layers with equal groups: narrow keys, narrow values, dense."""
    dense = dense_config_of(case, **({"sliding_window": None} if case.startswith(("mistral", "phi3")) else {}))
    spec = FAMILIES[dense.model_type]
    full = dense_shape(dense, spec)
    group, width = full.heads_per_kv[0], full.qk_head_dim
    heads = heads_per_kv or (group,)
    shapes = [
        LayerShape(heads_per_kv=heads, qk_head_dim=width // 2, v_head_dim=width - 1, intermediate_size=7),
        LayerShape(heads_per_kv=(1, 1), qk_head_dim=width, v_head_dim=width // 2, intermediate_size=40),
        full,
    ]
    return pruned_config(dense, spec, shapes, method="random", recipe={})


def vllm_config(config, tensor_parallel_size=1):
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config),
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel_size),
    )


def test_every_architecture_is_registered_and_again_is_harmless(vllm):
    vllm_plugin.register()
    first = dict(vllm.ModelRegistry)
    vllm_plugin.register()
    architectures = [f"IntraSlice{class_stem(family)}ForCausalLM" for family in known_families()]
    assert vllm.ModelRegistry == first == {name: vllm_plugin.BACKEND for name in architectures}
    assert vllm.checks.keys() == first.keys()


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_a_checkpoint_without_auto_map_has_a_registered_architecture(vllm, tmp_path, case):
    vllm_plugin.register()
    config = even_config(case)
    saved = json.loads(config.to_json_string())
    del saved["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded: Any = AutoConfig.from_pretrained(tmp_path)
    assert loaded.architectures[0] in vllm.ModelRegistry
    vllm.checks[loaded.architectures[0]].verify_and_update_config(vllm_config(loaded))


def test_an_old_release_gets_a_warning_only(vllm, caplog):
    vllm.__version__ = "0.10.1.dev3+g123"
    vllm_plugin.register()
    assert not vllm.ModelRegistry
    assert "vLLM 0.10.1.dev3+g123 cannot run checkpoints of intraslice; install vLLM 0.32.0 or later." in caplog.text


def test_without_vllm_importing_is_harmless_and_calling_says_so(monkeypatch):
    code = "import sys, intraslice.vllm_plugin; assert not {'vllm', 'torch'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    real = importlib.import_module

    def missing(name, package=None):
        if name == "vllm":
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="called by vLLM, which is not installed here"):
        vllm_plugin.register()


def test_split_layers_are_refused_before_and_while_the_model_is_built(vllm):
    vllm_plugin.register()
    config = even_config("llama-gqa-biases")
    sentence = "vLLM cannot split pruned layers over 2 devices; set tensor_parallel_size=1"
    with pytest.raises(ValueError, match=sentence):
        vllm.checks["IntraSliceLlamaForCausalLM"].verify_and_update_config(vllm_config(config, 2))
    vllm.tensor_parallel_size = 2
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=sentence):
        AutoModel.from_config(config)


def test_ragged_groups_are_refused_before_and_while_the_model_is_built(vllm):
    vllm_plugin.register()
    config = even_config("llama-gqa-biases", heads_per_kv=(2, 1))
    sentence = "layer 0 has 2, 1; prune with `--target vllm`"
    with pytest.raises(ValueError, match=sentence):
        vllm.checks["IntraSliceLlamaForCausalLM"].verify_and_update_config(vllm_config(config))
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=sentence):
        AutoModel.from_config(config)


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_the_attention_of_vllm_sees_one_width_and_gives_the_same(vllm, case):
    check_logits(vllm, even_config(case))


@pytest.mark.parametrize("case", KNOWN_CASES)
def test_every_family_through_the_attention_of_vllm(vllm, case):
    """Also those whose stock attention vLLM cannot call; the stock layers of Falcon cannot even be built for it."""
    dense, spec = family_config(case), spec_of(case)
    narrow = [replace(shape, v_head_dim=5, intermediate_size=7) for shape in dense_shapes(dense, spec)]
    check_logits(vllm, pruned_config(dense, spec, narrow, method="random", recipe={}))


def check_logits(vllm, config):
    # A copy, because a model changes the attention of the config it is given.
    expected = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager").double().eval()
    randomise(expected)
    actual = AutoModelForCausalLM.from_config(config, attn_implementation="vllm").double().eval()
    actual.load_state_dict(expected.state_dict())
    for layer in (module for module in actual.modules() if isinstance(module, PrunedAttention)):
        layer.attn = SimpleNamespace(head_size=32)
    # vLLM flattens all requests to one row.
    ids = tokens(batch=1)
    # Eager attention of transformers computes its softmax in float32 otherwise.
    with doubles(), torch.no_grad():
        logits = actual(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected(ids, use_cache=False).logits, atol=1e-10, rtol=0)
    assert vllm.calls == [layer for layer, shape in enumerate(config.layer_shapes) if shape.has_attention]


@pytest.mark.parametrize("family", known_families())
def test_no_tensor_of_ours_is_left_out_by_name(family):
    """vLLM leaves out what the stock class ignores, found anywhere in a name: for GPT-2 that was c_attn.bias."""
    dense = family_config(next(case for case in CASES if case.split()[0] == family))
    spec = FAMILIES[family]
    config = pruned_config(dense, spec, dense_shapes(dense, spec), method="random", recipe={})
    with torch.device("meta"):
        assert not AutoModel.from_config(config)._keys_to_ignore_on_load_unexpected


def test_layers_without_a_block(vllm):
    """vLLM runs them only because it finds the call of its attention in the source, and a width that it knows."""
    vllm_plugin.register()
    dense = dense_config_of("llama-mha")
    spec = FAMILIES["llama"]
    full = dense_shape(dense, spec)
    narrow = replace(full, qk_head_dim=full.qk_head_dim // 2, v_head_dim=full.qk_head_dim // 2)
    bare = full.without("attention")
    for shapes in ([bare, narrow.without("ffn"), full], [narrow, full, bare.without("ffn")]):
        config = pruned_config(dense, spec, shapes, method="random", recipe={})
        vllm.checks["IntraSliceLlamaForCausalLM"].verify_and_update_config(vllm_config(config))
        vllm.calls.clear()
        check_logits(vllm, config)
        sizes = [config.per_layer_config[layer] for layer, shape in enumerate(shapes) if not shape.has_attention]
        assert [(size.num_key_value_heads, size.head_dim) for size in sizes] == [(1, narrow.qk_head_dim)]


@pytest.mark.parametrize("module", [PrunedAttention, DroppedAttention])
def test_vllm_finds_the_attention_call_in_the_source_of_forward(module):
    tree = ast.parse(textwrap.dedent(inspect.getsource(module.forward)))
    looked_up = [
        node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node)
    ]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in looked_up]
    assert len(calls) == 1
    assert [ast.unparse(k.value) for k in calls[0].keywords if k.arg == "scaling"] == ["self.scaling"]
    config = pruned_model("llama-mha").config
    shape = config.layer_shapes[0]
    layers = AutoModelForCausalLM.from_config(
        pruned_config(
            dense_config_of("llama-mha"),
            FAMILIES["llama"],
            [shape, shape.without("attention"), shape],
            method="random",
            recipe={},
        )
    ).model.layers
    (attention,) = (layer.self_attn for layer in layers[:2] if isinstance(layer.self_attn, module))
    assert isinstance(attention.scaling, float) and isinstance(attention.layer_idx, int)
    assert attention.config._attn_implementation


def test_index_buffers_are_real_when_only_parameters_are_built_on_the_meta_device():
    accelerate = pytest.importorskip("accelerate")
    config = even_config("llama-gqa-biases")
    with accelerate.init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config)
    assert model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    assert model.layers[0].self_attn.rope_index.device.type == "cpu"


def test_a_norm_with_a_weight_per_head_is_not_taken_for_a_plain_one(vllm):
    """vLLM replaces what computes like an RMSNorm, but only modules without children; its own has one weight."""
    dense, spec = family_config("qwen3", use_sliding_window=False, layer_types=None), spec_of("qwen3")
    full = dense_shape(dense, spec)
    narrow = replace(full, qk_head_dim=full.qk_head_dim // 2, v_head_dim=full.qk_head_dim // 2, headed_qk_norm=True)
    shapes = [narrow, *[full] * (dense.num_hidden_layers - 1)]
    config = pruned_config(dense, spec, shapes, method="random", recipe={})
    layers = AutoModelForCausalLM.from_config(deepcopy(config)).model.layers
    norms = [layers[0].self_attn.q_norm, layers[0].self_attn.k_norm]
    assert [norm.weight.dim() for norm in norms] == [2, 2]
    assert all(list(norm.children()) for norm in norms)
    # Neither the norms of other layers nor those of their own class.
    assert not list(layers[1].self_attn.q_norm.children()) and not list(layers[0].input_layernorm.children())
    check_logits(vllm, config)
