"""What people do with a loaded model: generate, fine-tune, compile, look inside."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT, FAMILIES
from support.tiny_models import ONE_PER_FAMILY, pruned_model, tokens
from support.tolerances import EAGER, FLOAT64


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_generate_is_the_same_with_every_cache(case, attention):
    model = pruned_model(case, torch.float64, attention)
    options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    without = model.generate(tokens(), use_cache=False, **options)
    assert without.shape == (2, 25)
    dynamic = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(tokens(), **{CACHE_ARGUMENT: dynamic}, **options), without)
    assert torch.equal(model.generate(tokens(), **{CACHE_ARGUMENT: static}, **options), without)
    by_name = model.generate(tokens(), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(by_name, without)


def test_beam_search_and_padded_batch():
    model = pruned_model("llama-gqa-biases")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert model.generate(tokens(), num_beams=3, **options).shape[0] == 2
    padded = torch.nn.functional.pad(tokens(1), (4, 0), value=0)
    mask = (padded != 0).long()
    together = model.generate(padded, attention_mask=mask, **options)[:, 17:]
    assert torch.equal(together, model.generate(tokens(1), **options)[:, 13:])


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_eager_and_sdpa_agree_and_can_be_switched(case):
    model = pruned_model(case)
    with torch.no_grad():
        sdpa = model(tokens()).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(tokens()).logits, sdpa, **EAGER)


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_attention_weights_and_hidden_states(case):
    model = pruned_model(case, torch.float32, "eager")
    out = model(tokens(), output_attentions=True, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    for weights, shape in zip(out.attentions, model.config.layer_shapes, strict=True):
        assert weights.shape == (2, shape.num_attention_heads, 13, 13)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    step = model(tokens(2, 1), **{CACHE_ARGUMENT: model(tokens())[CACHE_ARGUMENT]}, output_attentions=True)
    visible = min(14, getattr(model.config, "sliding_window", None) or 14)
    for weights, shape in zip(step.attentions, model.config.layer_shapes, strict=True):
        assert weights.shape == (2, shape.num_attention_heads, 1, visible)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_gradient_checkpointing_gives_the_same_gradients(case):
    model = pruned_model(case).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **FLOAT64)
        if name.endswith(("q_proj.weight", "qkv_proj.weight")):
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("case", "targets"),
    [
        ("llama-gqa-biases", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
        ("phi3-gqa-partial-rope", ["qkv_proj", "gate_up_proj"]),
        ("opt", ["q_proj", "v_proj", "fc1"]),
    ],
)
def test_lora_train_save_merge(case, targets, tmp_path):
    base = pruned_model(case, torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")(input_ids=tokens()).logits
    torch.testing.assert_close(loaded, trained, atol=1e-4, rtol=0)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(tokens()).logits, trained, atol=1e-4, rtol=0)
    for path in ("configuration_intraslice.py", "modeling_intraslice.py", "families_intraslice.py"):
        assert (tmp_path / "merged" / path).exists(), "a fine-tuned model must load without the package too"


@pytest.mark.parametrize("case", ["phi3-gqa-partial-rope", "opt"])
def test_compiles_without_graph_breaks(case):
    model = pruned_model(case)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits, **FLOAT64)


def test_decode_step_compiles_without_graph_breaks():
    model = pruned_model("llama-gqa-biases")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        full = model(tokens()).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(tokens()[:, :12], **{CACHE_ARGUMENT: cache})
        position_ids = torch.full((2, 1), 12)
        step = compiled(tokens()[:, 12:], **{CACHE_ARGUMENT: cache}, position_ids=position_ids)
    torch.testing.assert_close(step.logits, full[:, 12:], **FLOAT64)


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_compiles_with_inductor(case):
    model = pruned_model(case, torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_flex_attention():
    model = pruned_model("llama-gqa-biases", torch.float32)
    with torch.no_grad():
        expected = model(tokens()).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_module_tree_prints_and_layers_hold_what_their_shapes_say(case):
    model = pruned_model(case, torch.float32)
    spec = FAMILIES[model.config.family]
    assert "PrunedAttention" in repr(model)
    for layer, shape in zip(model.get_submodule(spec.layers), model.config.layer_shapes, strict=True):
        weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
        assert weights == spec.num_parameters(shape, model.config.hidden_size)
