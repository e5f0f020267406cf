"""Pruned models on an accelerator."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT
from support.tiny_models import ONE_PER_FAMILY, pruned_model, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator"),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_accelerator_equals_cpu(case, attention, tmp_path):
    model = pruned_model(case, torch.float32, attention)
    device = torch.accelerator.current_accelerator()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=str(device), attn_implementation=attention)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids.to(device)).logits.cpu(), model(ids).logits, atol=1e-3, rtol=0)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(ids.to(device), **options).cpu(), model.generate(ids, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_like_it_prefills(dtype):
    device = torch.accelerator.current_accelerator()
    model = pruned_model("llama-gqa-biases", dtype).to(device)
    ids = tokens().to(device)
    with torch.no_grad():
        full = model(ids).logits
        cache = model(ids[:, :12], use_cache=True)[CACHE_ARGUMENT]
        step = model(ids[:, 12:], **{CACHE_ARGUMENT: cache}).logits
    # Prefill and decode take different kernels; both dtypes have at least 8 bits of mantissa.
    assert (step[:, 0] - full[:, 12]).norm() < 0.05 * full[:, 12].norm()
