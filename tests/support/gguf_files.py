"""Tiny GGUF files, written with gguf's own writer the way llama.cpp stores these architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch

from support.tiny import tiny_model, tiny_tokenizer

F32 = gguf.GGMLQuantizationType.F32


def interleave_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of query and key as llama.cpp does: the two channels of a rotary pair side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    family: str,
    quantization: Any = F32,
    *,
    fields: dict[str, Any] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    left_out: str = "",
    **overrides: Any,
) -> torch.nn.Module:
    model = tiny_model(family, **overrides)
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_name(f"Tiny {family}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    for key, value in (fields or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{family}.{key}", value)

    tokenizer = tiny_tokenizer()
    texts = [tokenizer.convert_ids_to_tokens(index) for index in range(len(tokenizer))]
    texts.append("th")
    texts += [f"<unused{index}>" for index in range(config.vocab_size - len(texts))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([1] * 256 + [3] * 3 + [1] * (config.vocab_size - 259))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)

    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name, tensor in state.items():
        stem, suffix = name.rsplit(".", 1)
        target = f"{names.get_name(stem)}.{suffix}"
        if target == left_out:
            continue
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            is_query = stem.endswith("q_proj")
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            tensor = interleave_pairs(tensor, heads)
        kind = quantization if tensor.dim() == 2 else F32
        writer.add_tensor(target, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
