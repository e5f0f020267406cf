"""Tiny composite models (a vision tower, a projector, a text tower) from configs, with random images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from support.tiny import BOS, EOS, PAD, VOCAB_SIZE, tiny_tokenizer

IMAGE = 259
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_WINDOWS = ["sliding_attention", "full_attention"] * 2
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}

CASES: dict[str, dict[str, Any]] = {
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": 9},
        "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {
        "text_config": {
            "model_type": "qwen3_vl_text",
            **_TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "hidden_size": 16,
            "intermediate_size": 24,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            # Its layers are also added to the first layers of the text tower.
            "deepstack_visual_indexes": [0, 1],
        },
        "image_token_id": IMAGE,
        "video_token_id": 260,
        "vision_start_token_id": 261,
        "vision_end_token_id": 262,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text",
            **_TEXT,
            "sliding_window": 5,
            "layer_types": _WINDOWS,
            "query_pre_attn_scalar": 8,
        },
        "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": True,
    },
}


def composite_config(model_type: str, **overrides: Any) -> Any:
    return CONFIG_MAPPING[model_type](**{**CASES[model_type], **overrides})


def composite_model(model_type: str, **overrides: Any) -> Any:
    """Stock composite with weights large enough that every part of it matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(composite_config(model_type, **overrides)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_composite(model_type: str, folder: Path, **overrides: Any) -> Path:
    """Save a tiny composite as transformers does, which is the older layout of names."""
    composite_model(model_type, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_new_names(folder: Path) -> Path:
    """Give the tensors the names of the state dict, as newer checkpoints have them."""
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    renamed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del renamed["lm_head.weight"]
    assert len(renamed) == len(stored)
    # The youngest models never had older names.
    assert renamed.keys() != stored.keys() or model.config.model_type == "qwen3_vl"
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def image_inputs(model_type: str) -> dict[str, torch.Tensor]:
    """Return an image, and a text with its place in it."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    text = torch.randint(0, 250, (1, 21), generator=generator)
    ids = torch.cat((text[:, :2], torch.full((1, 4), IMAGE), text[:, 2:]), dim=1)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if model_type == "qwen3_vl":
        # 16 patches of two frames, of which four make a token.
        inputs["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if model_type == "mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16]])
    if model_type == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


def text_inputs() -> dict[str, torch.Tensor]:
    """Return a text that is longer than every window."""
    return {"input_ids": torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(4))}
