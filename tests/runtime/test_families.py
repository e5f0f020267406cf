"""Every row of the family table against the stock class, through the engine, and through a saved checkpoint."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from intraslice import api
from intraslice.checkpoint.reader import build_skeleton, open_folder
from intraslice.errors import IntraSliceError, UnsupportedModelError
from intraslice.inspection import inspect_model
from intraslice.layers.head import LanguageHead
from intraslice.placement import Placement
from intraslice.runtime import configuration_intraslice
from intraslice.runtime.configuration_intraslice import dense_shape, family_of_class
from intraslice.runtime.families_intraslice import FAMILIES, FamilySpec
from intraslice.runtime.modeling_intraslice import PrunedAttention, apply_layer_shape, causal_lm_class, model_classes
from intraslice.streaming.model import StreamedModel
from support.family_cases import KNOWN_CASES, KNOWN_FAMILIES, doubles, family_config, family_model, spec_of
from support.pruned import save
from support.tiny import tiny_tokenizer

# Sums of the same float64 terms in another order.
FLOAT64 = {"atol": 1e-10, "rtol": 0.0}
FAST = {
    "calibration.source": "builtin",
    "calibration.num_samples": 4,
    "calibration.seqlen": 24,
    "run.device": "cpu",
    "run.dtype": "float32",
    "attention.head_multiple": 2,
    "ffn.ffn_multiple": 2,
}


def tokens(length: int = 17) -> torch.Tensor:
    return torch.randint(3, 250, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved tiny model per family, made when it is asked for."""
    root = tmp_path_factory.mktemp("families")

    def saved(family: str):
        if not (root / family).exists():
            family_model(family, torch.float32).save_pretrained(root / family)
            tiny_tokenizer().save_pretrained(root / family)
        return root / family

    return saved


@pytest.mark.parametrize("case", KNOWN_CASES)
def test_dense_shape_equals_the_stock_class(case):
    model = family_model(case)
    view, spec = copy.deepcopy(model), spec_of(case)
    for index, layer in enumerate(view.get_submodule(spec.layers)):
        apply_layer_shape(layer, view.config, spec, index, dense_shape(view.config, spec))
        assert isinstance(layer.get_submodule(spec.attention), PrunedAttention)
    assert view.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad(), doubles():
        torch.testing.assert_close(view(tokens()).logits, model(tokens()).logits, **FLOAT64)


@pytest.mark.parametrize("case", KNOWN_CASES)
def test_a_layer_taken_apart_equals_the_stock_layer(case, folders):
    """Also says that buffers outside of the layers are restored, and that the arguments of a layer are understood."""
    spec = spec_of(case)
    dense = AutoModelForCausalLM.from_pretrained(folders(case), dtype=torch.float64).eval()
    inputs, outputs = [], []
    for layer in dense.get_submodule(spec.layers):
        layer.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0]), with_kwargs=True)
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    placement = Placement(torch.device("cpu"), torch.float64, torch.float64, torch.float64)
    streamed = StreamedModel(open_folder(folders(case)), placement, (2, 17))
    blocks = [streamed.load_layer(index) for index in range(streamed.num_layers)]
    with torch.no_grad(), doubles():
        dense(tokens(), use_cache=False)
        torch.testing.assert_close(streamed.embed(tokens()), inputs[0], **FLOAT64)
        for index, block in enumerate(blocks):
            # As the model makes them in this precision.
            block.arguments = streamed._recorders[index].arguments
            found = block.ffn_step(block.attention_step(inputs[index]))
            # Some layers return the weights of attention as well.
            expected = outputs[index][0] if isinstance(outputs[index], tuple) else outputs[index]
            torch.testing.assert_close(found, expected, **FLOAT64)


@pytest.mark.parametrize("case", KNOWN_CASES)
def test_the_head_makes_the_logits_of_the_model(case):
    model = family_model(case)
    with torch.no_grad():
        hidden = model.base_model(tokens(), use_cache=False).last_hidden_state
        assert torch.equal(LanguageHead(model)(hidden), model(tokens(), use_cache=False).logits)
        part = LanguageHead(model)(hidden[0, 3:7])
        torch.testing.assert_close(part, model(tokens(), use_cache=False).logits[0, 3:7], **FLOAT64)


@pytest.mark.parametrize("case", KNOWN_CASES)
def test_sparsity_zero_is_the_identity(case, folders, tmp_path):
    api.prune(str(folders(case)), output=tmp_path / "out", sparsity=0.0, options=FAST)
    found, dense = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "out", folders(case)))
    with torch.no_grad():
        # float32 rounding; logits are of size 1 to 30.
        torch.testing.assert_close(found(tokens()).logits, dense(tokens()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", KNOWN_CASES)
def test_a_pruned_model_reloads_to_what_was_streamed(case, folders, tmp_path):
    """The layers as the engine leaves them, run in pieces, against the saved checkpoint."""
    api.prune(str(folders(case)), output=tmp_path / "out", sparsity=0.3, options=FAST)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    spec, shapes = spec_of(case), loaded.config.layer_shapes
    assert any(shape != dense_shape(loaded.config, spec) for shape in shapes)
    placement = Placement(torch.device("cpu"), torch.float32, torch.float32, torch.float64)
    streamed = StreamedModel(open_folder(folders(case)), placement, (2, 17))
    state = loaded.state_dict()
    with torch.no_grad():
        hidden = streamed.embed(tokens())
        for index, shape in enumerate(shapes):
            prefix = f"{spec.layers}.{index}."
            stored = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
            block = streamed.load_pruned_layer(index, shape, stored)
            hidden = block.ffn_step(block.attention_step(hidden))
        streamed._recorders[-1].replacement = hidden
        logits = streamed.model(tokens(), use_cache=False).logits
        torch.testing.assert_close(logits, loaded(tokens()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", KNOWN_CASES)
def test_half_precision(case):
    """Some families rotate in float32 whatever the model computes in."""
    model = family_model(case, torch.bfloat16)
    spec, shape = spec_of(case), dense_shape(model.config, spec_of(case))
    layer = model.get_submodule(spec.layers)[0]
    apply_layer_shape(layer, model.config, spec, 0, replace(shape, v_head_dim=shape.v_head_dim - 1))
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    with torch.no_grad():
        assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "field"), [(name, field) for name in KNOWN_FAMILIES for field in FAMILIES[name].refuse]
)
def test_what_a_family_cannot_have_is_refused_by_name(family, field, folders, tmp_path):
    data = json.loads((folders(family) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, field: 1.0 if field == "clip_qkv" else True}))
    for look in (open_folder, lambda folder: inspect_model(str(folder))):
        with pytest.raises(UnsupportedModelError, match=f"has {field} = .* cannot be pruned"):
            look(tmp_path)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("falcon two norms", {"num_kv_heads": 3}, "4 heads are no multiple of 3 kv heads"),
        # This form of the class splits the fused matrix by query heads, whatever num_kv_heads says.
        ("falcon sequential", {"num_kv_heads": 2}, "2 kv heads, which the falcon class of transformers cannot run"),
        ("falcon", {"alibi": True}, "has alibi = True"),
        ("falcon", {"num_attention_heads": 5}, "is not valid|cannot run"),
        ("gpt_neox", {"num_attention_heads": 5}, "is not valid|cannot run"),
        ("gpt2", {"n_head": 5}, "is not valid|cannot run"),
    ],
)
def test_heads_that_the_stock_class_cannot_run_are_refused(case, changes, words, folders, tmp_path):
    shutil.copytree(folders(case), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(IntraSliceError, match=words) as caught:
        open_folder(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_since_says_whether_the_installed_transformers_has_the_family():
    installed = Version(transformers.__version__)
    assert set(KNOWN_FAMILIES) == {name for name, spec in FAMILIES.items() if Version(spec.since) <= installed}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 128}, r"mixtures of experts \(num_experts\)"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "n_routed_experts": 8}, "latent attention"),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "gpt_bigcode"}, "one key and value for all heads in a fused matrix"),
    ],
)
def test_what_is_missing_for_a_model_is_said(config, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for look in (open_folder, lambda folder: inspect_model(str(folder))):
        with pytest.raises(UnsupportedModelError, match=f"missing for it: .*{words}.*; supported: llama"):
            look(tmp_path)


def test_a_family_that_is_newer_than_transformers_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "future", FamilySpec(name="future", since="9.9"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "future"}))
    with pytest.raises(UnsupportedModelError, match=r"needs transformers 9\.9 or later"):
        open_folder(tmp_path)
    assert "future" not in configuration_intraslice.known_families()
    with pytest.raises(AttributeError, match=r"future needs transformers 9\.9"):
        family_of_class("IntraSliceFutureForCausalLM")


def test_rope_parameters_of_each_layer_type_are_written_as_they_are():
    config = AutoConfig.for_model("intraslice_cwm")
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    config.rope_parameters = nested
    saved = config.to_diff_dict()
    assert saved["rope_parameters"] == nested and "rope_theta" not in saved


@pytest.mark.parametrize("case", KNOWN_CASES)
def test_zero_padding_gives_the_stock_class(case, folders, tmp_path):
    """The zero-padded twin; the exporter compares the logits itself, in float32, before it publishes."""
    # Norms of query and key that differ from head to head have no place in stock classes.
    options = FAST if spec_of(case).qk_norm is None else {**FAST, "attention.qk_width": "dense"}
    api.prune(str(folders(case)), output=tmp_path / "out", sparsity=0.3, options=options)
    report = api.export(tmp_path / "out", to="padded", output=tmp_path / "padded")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-3
    pruned, twin = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64).eval() for name in ("out", "padded")
    )
    assert twin.config.model_type == (spec_of(case).head_of or spec_of(case).name)
    if spec_of(case).qk_norm is not None and spec_of(case).qk_norm.over == "all":
        # A norm over all heads divides by more channels in the twin. Its weight takes that back, and a checkpoint in
        # float32 rounds it: that alone changes the logits by 1e-7. So the twin is made of a checkpoint in float64.
        save(pruned, tmp_path / "out64")
        api.export(tmp_path / "out64", to="padded", output=tmp_path / "padded64")
        twin = AutoModelForCausalLM.from_pretrained(tmp_path / "padded64", dtype=torch.float64).eval()
    with torch.no_grad(), doubles():
        torch.testing.assert_close(twin(tokens()).logits, pruned(tokens()).logits, **FLOAT64)


@pytest.mark.parametrize("case", KNOWN_CASES)
def test_perplexity_is_that_of_a_plain_loop(case, folders, tmp_path):
    """Scales and caps of the logits are the model's own; the windows are longer than those of attention."""
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps until the evening."
    (tmp_path / "text.txt").write_text(text)
    found = api.evaluate(folders(case), text=str(tmp_path / "text.txt"), seqlen=20, windows=3)
    model = AutoModelForCausalLM.from_pretrained(folders(case)).eval()
    windows = torch.tensor(AutoTokenizer.from_pretrained(folders(case))(text)["input_ids"])[:60].view(3, 20)
    if spec_of(case).starts_with_bos:
        windows[:, 0] = model.config.bos_token_id
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1].double(), window[1:])
            for window in windows
        ]
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-6)


def test_blocks_may_be_sequential_where_the_config_says_so(tmp_path):
    """The case of GPT-NeoX has parallel blocks; most models that are parallel by choice exist in both forms."""
    config = family_config("gpt_neox")
    config.use_parallel_residual = False
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    api.prune(str(tmp_path / "dense"), output=tmp_path / "out", sparsity=0.0, options=FAST)
    found, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("out", "dense"))
    with torch.no_grad():
        # float32 rounding; logits are of size 1.
        torch.testing.assert_close(found(tokens()).logits, dense(tokens()).logits, atol=1e-5, rtol=0)


def test_scores_with_a_cap_are_not_computed_with_sdpa(monkeypatch):
    """Which leaves the cap out; releases of transformers before 5.24 do not say so of their class."""
    monkeypatch.setattr(causal_lm_class("gemma2"), "_supports_sdpa", True)
    skeleton = build_skeleton(family_config("gemma2"), "gemma2", torch.float32)
    assert skeleton.config._attn_implementation == "eager"
    assert not model_classes("gemma2")[2]._supports_sdpa and model_classes("qwen3")[2]._supports_sdpa


def test_a_temperature_changes_only_queries_beyond_the_original_length():
    """Without it the logits of the later tokens would be others: the case of Ministral 3 switches it on."""
    model = family_model("ministral3")
    plain = copy.deepcopy(model)
    plain.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    with torch.no_grad():
        difference = (model(tokens()).logits - plain(tokens()).logits).abs().amax((0, 2))
    length = model.config.rope_parameters["original_max_position_embeddings"]
    assert (difference[:length] == 0).all() and (difference[length:] > 1e-3).all()


@pytest.mark.parametrize("family", [name for name in KNOWN_FAMILIES if "stock" not in FAMILIES[name].without_targets])
def test_one_shape_for_all_layers_is_a_stock_model(family, folders, tmp_path):
    api.prune(str(folders(family)), output=tmp_path / "out", sparsity=0.25, target="stock", options=FAST)
    report = api.export(tmp_path / "out", to="stock", output=tmp_path / "stock")
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-3


@pytest.mark.parametrize("family", KNOWN_FAMILIES)
def test_classes_are_found_again_by_name(family):
    for kind in model_classes(family):
        assert pickle.loads(pickle.dumps(kind)) is kind and copy.deepcopy(kind) is kind
    config = AutoConfig.for_model(f"intraslice_{family}")
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
