"""Show that llama.cpp's architectures with norms of query and key, or of outputs, take only one shape for all layers.

Writes random files of two layers as `qwen3` and as `gemma3`: layers alike, with other heads, and with other FFNs. Exit
status 1 when the first does not run, or when one of the others does: then pruned models of these families could be
exported with a shape per layer, as others are.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp  # type: ignore[import-not-found]
import numpy as np

HIDDEN, WIDTH, VOCABULARY = 64, 32, 32
LAYERS = {"alike": ((2, 2), (96, 96)), "other heads": ((2, 1), (96, 96)), "other FFNs": ((2, 2), (96, 64))}


def write(path: Path, architecture: str, heads: tuple[int, ...], ffn: tuple[int, ...]) -> None:
    """Write a random model.

    Args:
        path: of the file.
        architecture: as llama.cpp calls it.
        heads: query heads of each layer; there is one kv head.
        ffn: FFN channels of each layer.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(len(heads))
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(list(heads))
    writer.add_head_count_kv([1] * len(heads))
    writer.add_feed_forward_length(list(ffn))
    writer.add_key_length(WIDTH)
    writer.add_value_length(WIDTH)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    sizes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    for index, (count, channels) in enumerate(zip(heads, ffn, strict=True)):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,),
            "attn_q": (count * WIDTH, HIDDEN),
            "attn_k": (WIDTH, HIDDEN),
            "attn_v": (WIDTH, HIDDEN),
            "attn_q_norm": (WIDTH,),
            "attn_k_norm": (WIDTH,),
            "attn_output": (HIDDEN, count * WIDTH),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (channels, HIDDEN),
            "ffn_up": (channels, HIDDEN),
            "ffn_down": (HIDDEN, channels),
        }
        if architecture == "gemma3":
            layer |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
        sizes |= {f"blk.{index}.{name}": size for name, size in layer.items()}
    random = np.random.default_rng(0)
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(size).astype(np.float32) * 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def runs(path: Path) -> bool:
    """Return whether llama.cpp loads a file and computes logits."""
    try:
        model = llama_cpp.Llama(model_path=str(path), n_ctx=32, n_gpu_layers=0, logits_all=True, verbose=False)
    except ValueError:
        return False
    model.eval([1, 2, 3])
    finite = bool(np.isfinite(model.scores[:3]).all())
    model.close()
    return finite


def main() -> None:
    """Try all files."""
    said: list[str] = []

    def listen(level: int, text: bytes, data: object) -> None:
        if b"wrong shape" in text:
            said.append(text.decode(errors="replace").strip())

    # Kept here, because llama.cpp calls it as long as it lives.
    callback = llama_cpp.llama_log_callback(listen)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ("qwen3", "gemma3"):
            for name, (heads, ffn) in LAYERS.items():
                path = Path(folder) / f"{architecture}.gguf"
                write(path, architecture, heads, ffn)
                said.clear()
                found = runs(path)
                passed &= found == (name == "alike")
                print(f"{architecture:7} layers {name:12} {'runs' if found else 'refused: ' + ' '.join(said)}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
