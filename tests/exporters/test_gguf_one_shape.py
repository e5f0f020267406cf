"""GGUF files of families for which llama.cpp has an architecture with one shape for all layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from intraslice.checkpoint.pruned import open_pruned
from intraslice.errors import UnsupportedModelError
from intraslice.exporters.gguf import export_gguf
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.progress import SilentProgress
from intraslice.runtime.families_intraslice import LayerShape
from support.family_cases import family_config
from support.llama_cpp import read
from support.pruned import save_pruned

TOKENS = torch.randint(256, (1, 30), generator=torch.Generator().manual_seed(3))
DENSE = LayerShape(heads_per_kv=(2, 2), qk_head_dim=12, v_head_dim=12, intermediate_size=48)
FEWER = replace(DENSE, heads_per_kv=(2,), intermediate_size=20)
RAGGED = replace(DENSE, heads_per_kv=(1, 2), v_head_dim=7, intermediate_size=31)
SHORT = {"sliding_window": 5, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
PLAIN: dict[str, dict[str, Any]] = {
    "qwen3": {"use_sliding_window": False, "layer_types": None},
    "gemma": {},
    "gemma2": SHORT,
    "gemma3_text": {**SHORT, "rope_parameters": LINEAR},
    "olmo2": {},
    "olmo3": SHORT,
}


def saved(folder: Path, family: str, shapes: list[LayerShape], **config: Any) -> Path:
    given = {"num_hidden_layers": len(shapes), "attention_bias": False, **PLAIN[family], **config}
    return save_pruned(folder, family, shapes, dense=family_config(family, **given))


def export(source: Path, output: Path) -> ExportReport:
    return export_gguf(open_pruned(str(source)), output, ExportOptions(verify=False), SilentProgress())


def check_same_logits(source: Path, output: Path, tolerance: float = 1e-4) -> None:
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
        expected = model.eval()(TOKENS).logits[0]
    # float32 on both sides; the angles are rounded differently.
    torch.testing.assert_close(read(output).logits(TOKENS[0].tolist()), expected, atol=tolerance, rtol=0)


CASES: dict[str, tuple[str, list[LayerShape], dict[str, Any]]] = {
    "qwen3": ("qwen3", [FEWER, FEWER], {}),
    "qwen3, linear, tied": (
        "qwen3",
        [FEWER, FEWER],
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}, "tie_word_embeddings": True},
    ),
    "qwen3, padded": ("qwen3", [FEWER, RAGGED, DENSE.without("attention"), FEWER.without("ffn")], {}),
    "gemma": ("gemma", [FEWER, RAGGED], {}),
    "gemma2, windows": ("gemma2", [FEWER, RAGGED, FEWER], {}),
    "gemma3, windows": ("gemma3_text", [FEWER, FEWER, FEWER], {}),
    "gemma3, no windows": ("gemma3_text", [FEWER, FEWER], {"layer_types": ["full_attention"] * 2}),
    "gemma3, padded": ("gemma3_text", [DENSE.without("attention").without("ffn"), RAGGED, FEWER], {}),
    "olmo2, tied": ("olmo2", [replace(FEWER, qk_head_dim=8, v_head_dim=5)] * 2, {"tie_word_embeddings": True}),
    "olmo3, windows": ("olmo3", [replace(RAGGED, qk_head_dim=8, v_head_dim=8)] * 3, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_logits_as_the_checkpoint(tmp_path: Path, case: str) -> None:
    family, shapes, config = CASES[case]
    source = saved(tmp_path / "pruned", family, shapes, **config)
    report = export(source, tmp_path / "model.gguf")
    check_same_logits(source, tmp_path / "model.gguf")
    padded = [note for note in report.notes if "zero-padded" in note]
    assert bool(padded) == (len(set(shapes)) > 1 or "olmo" in case)


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_largest_gemmas_have_another_softmax_scale(tmp_path: Path, family: str, layers: int) -> None:
    """llama.cpp takes it from hidden_size / heads there, and the number of heads is another one after pruning."""
    small = replace(FEWER, intermediate_size=4)
    period = 2 if family == "gemma2" else 6
    kinds = ["sliding_attention" if i % period < period - 1 else "full_attention" for i in range(layers)]
    source = saved(tmp_path / "pruned", family, [small] * layers, layer_types=kinds)
    export(source, tmp_path / "model.gguf")
    # So many layers add up more rounding; the scale of fewer heads would be another one by a third.
    check_same_logits(source, tmp_path / "model.gguf", 5e-3)


YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
REFUSED: dict[str, tuple[str, LayerShape, dict[str, Any], tuple[str, ...]]] = {
    "norm of each head": (
        "qwen3",
        replace(FEWER, qk_head_dim=8, headed_qk_norm=True),
        {},
        ("--target llama.cpp", "qk_width = dense"),
    ),
    "biases": ("qwen3", FEWER, {"attention_bias": True}, ("biases of q, k, v, o",)),
    "repair": ("gemma2", replace(FEWER, output_bias=True), {}, ("biases on o_proj and down_proj",)),
    "activation": ("gemma3_text", FEWER, {"hidden_activation": "silu"}, ("'silu'", "'gelu_pytorch_tanh' only")),
    "yarn": ("qwen3", FEWER, {"rope_parameters": YARN}, ("'yarn'",)),
    "order": ("gemma2", FEWER, {"layer_types": ["full_attention", "sliding_attention"] * 2}, ("windows but in all",)),
    "cap": ("gemma3_text", FEWER, {"final_logit_softcapping": 5.0}, ("no final_logit_softcapping",)),
    "no cap": ("gemma2", FEWER, {"attn_logit_softcapping": None}, ("leave attn_logit_softcapping out",)),
    "head": ("gemma", FEWER, {"tie_word_embeddings": False}, ("output matrix besides the embedding",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_architecture_has_no_place_for_is_refused(tmp_path: Path, case: str) -> None:
    family, shape, config, words = REFUSED[case]
    layers = len(config.get("layer_types") or SHORT["layer_types"])
    source = saved(tmp_path / "pruned", family, [shape] * layers, **config)
    with pytest.raises(UnsupportedModelError) as caught:
        export(source, tmp_path / "model.gguf")
    message = str(caught.value)
    assert "\n" not in message and "GGUF" in message and all(word in message for word in words)
    assert not (tmp_path / "model.gguf").exists()


def test_a_file_is_replaced_by_its_mark(tmp_path: Path) -> None:
    source, output = saved(tmp_path / "pruned", "qwen3", [FEWER, FEWER]), tmp_path / "model.gguf"
    for _ in range(2):
        export_gguf(open_pruned(str(source)), output, ExportOptions(verify=False, overwrite=True), SilentProgress())
