"""What llama.cpp makes of a GGUF file, written down from its equations; shares no code with the exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

# Every so many layers the last one has no window.
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "olmo2": 4}


class File:
    """The fields and tensors of a file, in float32, and what all architectures do with them."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self.architecture = self.fields["general.architecture"]
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            for tensor in reader.tensors
        }
        self.width = self.get("attention.key_length")
        assert self.width == self.get("attention.value_length") == self.get("rope.dimension_count")
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        found = self.fields.get(f"{self.architecture}.{key}", default)
        assert found is not None, key
        return found

    def linear(self, name: str, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        assert tuple(weight.shape) == (rows, columns), name
        self.used |= {f"{name}.weight"} | ({f"{name}.bias"} if bias is not None else set())
        return torch.nn.functional.linear(x, weight, bias)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.used.add(name)
        eps = self.get("attention.layer_norm_rms_epsilon")
        assert self.tensors[name].shape == x.shape[-1:], name
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.tensors[name]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm("output_norm.weight", x)
        head = "output" if "output.weight" in self.tensors else "token_embd"
        logits = self.linear(head, x, len(self.fields["tokenizer.ggml.tokens"]), self.get("embedding_length"))
        assert self.used == self.tensors.keys(), "tensors that llama.cpp would not use"
        return logits


class Interpreter(File):
    """Architecture deci: a shape per layer."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        assert self.architecture == "deci"

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(self.width // 2, dtype=torch.float64)
        angles = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * self.get("rope.freq_base") ** (
            -2 * steps / self.width
        )
        if "rope_freqs.weight" in self.tensors:
            self.used.add("rope_freqs.weight")
            angles = angles / self.tensors["rope_freqs.weight"].double()
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        D, T, W = self.get("embedding_length"), len(tokens), self.width
        self.used = {"token_embd.weight"}
        x = self.tensors["token_embd.weight"][tokens]
        mask = torch.full((T, T), float("-inf")).triu(1)
        for i in range(self.get("block_count")):
            heads, kv_heads = self.get("attention.head_count")[i], self.get("attention.head_count_kv")[i]
            ffn, block = self.get("feed_forward_length")[i], f"blk.{i}"
            # The head width is read only if the first layer has heads.
            assert (heads > 0) == (kv_heads > 0) and (heads > 0 or i > 0)
            cur = x
            if heads > 0:
                assert heads % kv_heads == 0
                h = self.norm(f"{block}.attn_norm.weight", x)
                q = self.rope(self.linear(f"{block}.attn_q", h, heads * W, D).view(T, heads, W))
                k = self.rope(self.linear(f"{block}.attn_k", h, kv_heads * W, D).view(T, kv_heads, W))
                v = self.linear(f"{block}.attn_v", h, kv_heads * W, D).view(T, kv_heads, W)
                kv_of_head = torch.arange(heads) // (heads // kv_heads)
                scores = torch.einsum("thw,shw->hts", q, k[:, kv_of_head]) / W**0.5 + mask
                context = torch.einsum("hts,shw->thw", scores.softmax(-1), v[:, kv_of_head]).reshape(T, -1)
                cur = x + self.linear(f"{block}.attn_output", context, D, heads * W)
            if ffn == 0:
                # The next layer goes on with what this one was given; in the last one the choice of tokens is lost.
                assert i < self.get("block_count") - 1
                continue
            x = cur
            h = self.norm(f"{block}.ffn_norm.weight", x)
            gate = torch.nn.functional.silu(self.linear(f"{block}.ffn_gate", h, ffn, D))
            x = x + self.linear(f"{block}.ffn_down", gate * self.linear(f"{block}.ffn_up", h, ffn, D), D, ffn)
        return self.head(x)


class OneShape(File):
    """The architectures with one shape for all layers: gemma, gemma2, gemma3, olmo2 and qwen3."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        assert self.architecture in ("gemma", "gemma2", "gemma3", "olmo2", "qwen3")
        self.gemma = self.architecture.startswith("gemma")
        period = self.get("attention.sliding_window_pattern", WINDOW_PERIODS.get(self.architecture, 1))
        self.window = self.get("attention.sliding_window", 4096 if self.architecture == "gemma2" else 0)
        layers = range(self.get("block_count"))
        self.windowed = [self.window > 0 and i % period < period - 1 for i in layers]
        assert self.architecture in WINDOW_PERIODS or self.window == 0, "llama.cpp would not read it"

    def optional_norm(self, name: str, x: torch.Tensor, architectures: str) -> torch.Tensor:
        """Return the norm of x in the architectures that have it."""
        return self.norm(f"{name}.weight", x) if self.architecture in architectures.split() else x

    def rope(self, x: torch.Tensor, windowed: bool) -> torch.Tensor:
        base, scale = self.get("rope.freq_base"), 1.0
        if self.get("rope.scaling.type", "none") == "linear":
            scale = 1.0 / self.get("rope.scaling.factor")
        if windowed and self.architecture == "gemma3":
            base, scale = self.get("rope.freq_base_swa", 1e4), 1.0
        elif windowed and self.architecture == "olmo2":
            scale = 1.0
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float64)
        angles = scale * torch.arange(len(x), dtype=torch.float64)[:, None] * base ** (-steps / half)
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)

    def attention(self, i: int, h: torch.Tensor) -> torch.Tensor:
        D, T, W, block = self.get("embedding_length"), len(h), self.width, f"blk.{i}"
        heads, kv_heads = self.get("attention.head_count"), self.get("attention.head_count_kv")
        q = self.linear(f"{block}.attn_q", h, heads * W, D)
        k = self.linear(f"{block}.attn_k", h, kv_heads * W, D)
        q, k = (self.optional_norm(f"{block}.attn_{name}_norm", x, "olmo2") for name, x in (("q", q), ("k", k)))
        q, k = q.view(T, heads, W), k.view(T, kv_heads, W)
        q, k = (self.optional_norm(f"{block}.attn_{name}_norm", x, "qwen3 gemma3") for name, x in (("q", q), ("k", k)))
        q, k = self.rope(q, self.windowed[i]), self.rope(k, self.windowed[i])
        v = self.linear(f"{block}.attn_v", h, kv_heads * W, D).view(T, kv_heads, W)
        layers = {"gemma2": 46, "gemma3": 62}.get(self.architecture)
        scale = (D // heads if self.get("block_count") == layers else W) ** -0.5
        kv_of_head = torch.arange(heads) // (heads // kv_heads)
        scores = torch.einsum("thw,shw->hts", q * scale, k[:, kv_of_head])
        if self.architecture == "gemma2":
            scores = self.capped(scores, self.get("attn_logit_softcapping", 50.0))
        distance = torch.arange(T)[:, None] - torch.arange(T)
        seen = (distance >= 0) & (distance < (self.window if self.windowed[i] else T))
        context = torch.einsum("hts,shw->thw", scores.masked_fill(~seen, -1e30).softmax(-1), v[:, kv_of_head])
        return self.linear(f"{block}.attn_output", context.reshape(T, -1), D, heads * W)

    @staticmethod
    def capped(x: torch.Tensor, cap: float) -> torch.Tensor:
        return cap * torch.tanh(x / cap)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        D, ffn = self.get("embedding_length"), self.get("feed_forward_length")
        self.used = {"token_embd.weight"}
        x = self.tensors["token_embd.weight"][tokens] * (D**0.5 if self.gemma else 1.0)
        before, after = "gemma gemma2 gemma3 qwen3", "gemma2 gemma3 olmo2"
        for i in range(self.get("block_count")):
            block = f"blk.{i}"
            h = self.attention(i, self.optional_norm(f"{block}.attn_norm", x, before))
            x = x + self.optional_norm(f"{block}.post_attention_norm", h, after)
            h = self.optional_norm(f"{block}.ffn_norm", x, before)
            gate = self.linear(f"{block}.ffn_gate", h, ffn, D)
            gate = torch.nn.functional.gelu(gate, approximate="tanh") if self.gemma else torch.nn.functional.silu(gate)
            h = self.linear(f"{block}.ffn_down", gate * self.linear(f"{block}.ffn_up", h, ffn, D), D, ffn)
            x = x + self.optional_norm(f"{block}.post_ffw_norm", h, after)
        # These have no way to say that the embedding is the output matrix, or none to say that it is not.
        assert ("output.weight" in self.tensors) or self.architecture != "olmo2"
        assert ("output.weight" not in self.tensors) or self.architecture not in ("gemma", "gemma2")
        logits = self.head(x)
        return (
            self.capped(logits, self.get("final_logit_softcapping", 30.0)) if self.architecture == "gemma2" else logits
        )


def read(path: Path) -> Interpreter | OneShape:
    """Return the reading of a file by its architecture."""
    return Interpreter(path) if File(path).architecture == "deci" else OneShape(path)
