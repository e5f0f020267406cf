"""GGUF files for llama.cpp.

llama.cpp runs layers of different head counts and FFN widths only in its architecture `deci`: arrays of sizes, one head
width W for all, groups of one size within a layer, softmax scale 1 / sqrt(W), and the two channels of a rotary pair
side by side. Whatever does not fit is zero-padded, which is exact. `gguf_plan` says what the file holds.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.checkpoint.workfolder import GGUF_FILE, staged_output
from intraslice.checkpoint.writer import check_output
from intraslice.errors import CheckpointError, MissingExtraError, OutputError
from intraslice.exporters.gguf_plan import FilePlan, make_plan
from intraslice.exporters.gguf_vocabulary import add_vocabulary
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.exporters.padding import pad_layer, scale_queries, with_output_biases
from intraslice.exporters.verify import verify
from intraslice.files import writing
from intraslice.names import expanded
from intraslice.placement import dtype_name
from intraslice.progress import Progress
from intraslice.runtime.families_intraslice import LayerShape

ARCHITECTURE = "deci"
_VERIFY_CONTEXT = 64
# Magic, version, two counts, and the key and value of the architecture.
_HEADER_BYTES = 96


def export_gguf(checkpoint: PrunedCheckpoint, output: Path, options: ExportOptions, progress: Progress) -> ExportReport:
    """Write a pruned checkpoint as one GGUF file that stock llama.cpp runs.

    Args:
        checkpoint: what to export; one of its layers is in memory at a time.
        output: the file; it appears under this name only when it is whole.
        options: dtype, tokenizer_from, verify and overwrite are used.
        progress: advances by layers.

    Raises:
        MissingExtraError: the package gguf is not installed.
        UnsupportedModelError: llama.cpp has no place for what the model does.
        CheckpointError: the checkpoint or the tokenizer cannot be read, or llama.cpp computes something else.
        OutputError: the file exists or cannot be written.
    """
    started = time.perf_counter()
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise MissingExtraError(
            "the package that writes GGUF files is missing: pip install 'intraslice[gguf]'"
        ) from error
    _check_output(output, options)
    plan = make_plan(checkpoint, options)
    notes = list(plan.notes)
    rest = _rest(checkpoint, plan)
    rows = rest["token_embd.weight"].shape[0]
    with staged_output(output, "export") as work, _closed(GGUFWriter(work.path / GGUF_FILE, ARCHITECTURE)) as writer:
        temporary = work.path / GGUF_FILE
        _add_sizes(writer, checkpoint, plan, rows)
        notes.append(add_vocabulary(writer, checkpoint, options.tokenizer_from, rows))
        with progress.step(f"Writing {output.name}", checkpoint.num_layers) as advance:
            for _ in _written_layers(writer, checkpoint, plan, rest, output):
                advance(1)
        with writing(output):
            writer.close()
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        difference = None
        if options.verify:
            difference = _verified(temporary, checkpoint, plan.dtype)
            if difference is None:
                notes.append("not verified: llama-cpp-python is not installed.")
        # Another process may have written it meanwhile.
        _check_output(output, options)
        with writing(output):
            os.replace(temporary, output)
    return ExportReport(
        to="gguf",
        output=str(output),
        notes=tuple(notes),
        max_logit_difference=difference,
        seconds=time.perf_counter() - started,
    )


def _check_output(output: Path, options: ExportOptions) -> None:
    name = repr(str(output))
    if not output.exists():
        check_output(output, overwrite=False)
        return
    if output.is_dir():
        raise OutputError(f"output {name} is a folder; give the name of a .gguf file")
    if not options.overwrite:
        raise OutputError(f"output {name} already exists; choose another name or pass --overwrite")
    if options.tokenizer_from and output.resolve() == expanded(options.tokenizer_from).resolve():
        raise OutputError(f"output {name} is the file that the tokenizer comes from; choose another name")
    with open(output, "rb") as file:
        begins = file.read(_HEADER_BYTES)
    if not begins.startswith(b"GGUF"):
        raise OutputError(f"output {name} is not a GGUF file, so --overwrite does not replace it")
    # The first key of the file: it may be the dense model of a checkpoint.
    if ARCHITECTURE.encode() not in begins:
        raise OutputError(f"output {name} is not a GGUF file of a pruned model, so --overwrite does not replace it")


def _add_sizes(writer: Any, checkpoint: PrunedCheckpoint, plan: FilePlan, rows: int) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    values = vars(checkpoint.dense)
    file_types = {
        torch.float32: LlamaFileType.ALL_F32,
        torch.float16: LlamaFileType.MOSTLY_F16,
        torch.bfloat16: LlamaFileType.MOSTLY_BF16,
    }
    writer.add_type("model")
    writer.add_name(checkpoint.folder.resolve().name)
    writer.add_file_type(file_types[plan.dtype])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(plan.context_length)
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(checkpoint.num_layers)
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_rope_freq_base(float(values["rope_parameters"]["rope_theta"]))
    writer.add_rope_dimension_count(plan.width)
    writer.add_key_length(plan.width)
    writer.add_value_length(plan.width)
    writer.add_head_count([shape.num_attention_heads for shape in plan.shapes])
    writer.add_head_count_kv([shape.num_key_value_heads for shape in plan.shapes])
    writer.add_feed_forward_length([shape.intermediate_size for shape in plan.shapes])


def _rest(checkpoint: PrunedCheckpoint, plan: FilePlan) -> dict[str, Tensor]:
    """Load what is outside the layers, under GGUF's names."""
    base = checkpoint.spec.layers.rsplit(".", 1)[0]
    names = {f"{base}.embed_tokens.weight": "token_embd.weight", f"{base}.norm.weight": "output_norm.weight"}
    if not vars(checkpoint.dense)["tie_word_embeddings"]:
        names["lm_head.weight"] = "output.weight"
    tensors = checkpoint.load_rest()
    if "lm_head.weight" not in names:
        tensors.pop("lm_head.weight", None)
    if tensors.keys() != names.keys():
        different = sorted(tensors.keys() ^ names.keys())
        raise CheckpointError(f"{checkpoint.name!r} does not hold what GGUF has a place for: {', '.join(different)}")
    rest = {names[name]: tensor for name, tensor in tensors.items()}
    if plan.rope_factors is not None:
        rest["rope_freqs.weight"] = plan.rope_factors
    return rest


def _written_layers(
    writer: Any, checkpoint: PrunedCheckpoint, plan: FilePlan, rest: dict[str, Tensor], output: Path
) -> Iterator[int]:
    """Write the whole file; yields the number of each layer that is done. Empties `rest`."""
    # All layers of a file have the same tensors, but for blocks that are not there.
    names: dict[tuple[str, ...], tuple[str, ...]] = {}
    slots = {name: tuple(tensor.shape) for name, tensor in rest.items()}
    for index, shape in enumerate(plan.shapes):
        if shape.dropped not in names:
            names[shape.dropped] = tuple(_layer_tensors(checkpoint, plan, index))
        sizes = _layer_sizes(shape, plan.width, checkpoint.dense.hidden_size)
        slots |= {f"blk.{index}.{name}": sizes[name] for name in names[shape.dropped]}
    for name, size in slots.items():
        _announce(writer, name, size, plan.dtype)
    with writing(output):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    for name in list(rest):
        _write(writer, name, rest.pop(name), plan.dtype, output)
    for index in range(checkpoint.num_layers):
        tensors = _layer_tensors(checkpoint, plan, index)
        wanted = names[plan.shapes[index].dropped]
        if tensors.keys() != set(wanted):
            raise CheckpointError(f"layer {index} of {checkpoint.name!r} has other biases than layer 0")
        for name in wanted:
            _write(writer, f"blk.{index}.{name}", tensors.pop(name), plan.dtype, output)
        yield index


def _layer_sizes(shape: LayerShape, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    query, kv, ffn = shape.num_attention_heads * width, shape.num_key_value_heads * width, shape.intermediate_size
    rows = {"attn_q": query, "attn_k": kv, "attn_v": kv, "attn_output": hidden}
    rows |= {"ffn_gate": ffn, "ffn_up": ffn, "ffn_down": hidden}
    columns = {"attn_output": query, "ffn_down": ffn}
    sizes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    for name, count in rows.items():
        sizes[f"{name}.weight"] = (count, columns.get(name, hidden))
        sizes[f"{name}.bias"] = (count,)
    return sizes


def _layer_tensors(checkpoint: PrunedCheckpoint, plan: FilePlan, index: int) -> dict[str, Tensor]:
    """Load a layer in the form of the file, names relative to the layer."""
    spec = checkpoint.spec
    layer = checkpoint.load_layer(index)
    if layer.shape != plan.shapes[index]:
        layer = pad_layer(layer, plan.shapes[index], checkpoint.pair_channels(index), plan.pairs)
    layer = scale_queries(layer, plan.query_scale)
    norms = {f"{spec.attention_norm}.weight": "attn_norm.weight", f"{spec.ffn_norm}.weight": "ffn_norm.weight"}
    if layer.rest.keys() != norms.keys():
        different = ", ".join(sorted(layer.rest.keys() ^ norms.keys()))
        raise CheckpointError(
            f"layer {index} of {checkpoint.name!r} does not hold what GGUF has a place for: {different}"
        )
    if checkpoint.has_output_biases:
        layer = with_output_biases(layer)
    attention, ffn = layer.attention, layer.ffn
    found: dict[str, Tensor | None] = {norms[name]: tensor for name, tensor in layer.rest.items()}
    if layer.shape.has_attention:
        found |= {
            "attn_q.weight": attention.q[:, plan.row_order].flatten(0, 1),
            "attn_k.weight": attention.k[:, plan.row_order].flatten(0, 1),
            "attn_v.weight": attention.v.flatten(0, 1),
            "attn_output.weight": attention.o,
            "attn_q.bias": None if attention.q_bias is None else attention.q_bias[:, plan.row_order].flatten(),
            "attn_k.bias": None if attention.k_bias is None else attention.k_bias[:, plan.row_order].flatten(),
            "attn_v.bias": None if attention.v_bias is None else attention.v_bias.flatten(),
            "attn_output.bias": attention.o_bias,
        }
    else:
        del found["attn_norm.weight"]
    if layer.shape.has_ffn:
        found |= {
            "ffn_gate.weight": ffn.gate,
            "ffn_up.weight": ffn.up,
            "ffn_down.weight": ffn.down,
            "ffn_gate.bias": ffn.gate_bias,
            "ffn_up.bias": ffn.up_bias,
            "ffn_down.bias": ffn.down_bias,
        }
    else:
        del found["ffn_norm.weight"]
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _announce(writer: Any, name: str, size: tuple[int, ...], matrix_dtype: torch.dtype) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType as Kind

    kinds = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
    dtype = matrix_dtype if len(size) > 1 else torch.float32
    nbytes = math.prod(size) * dtype.itemsize
    # The numpy type is of no account beside the GGUF type.
    writer.add_tensor_info(name, size, np.dtype(np.float32), nbytes, raw_dtype=kinds[dtype])


def _write(writer: Any, name: str, tensor: Tensor, matrix_dtype: torch.dtype, output: Path) -> None:
    stored = tensor.to(matrix_dtype if tensor.dim() > 1 else torch.float32).contiguous()
    if not stored.isfinite().all():
        dtype = dtype_name(stored.dtype)
        raise CheckpointError(f"tensor {name!r} has values that {dtype} cannot hold; choose float32 or bfloat16")
    # numpy has no bfloat16; the bytes are what counts.
    raw = stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored
    with writing(output):
        writer.write_tensor_data(raw.numpy())


@contextmanager
def _closed(writer: Any) -> Iterator[Any]:
    """Close the file in any case, so that it can be deleted on every system."""
    try:
        yield writer
    finally:
        try:
            writer.close()
        except OSError:
            # A full disk: closing flushes. The error that counts is on its way already.
            pass


def _verified(path: Path, checkpoint: PrunedCheckpoint, dtype: torch.dtype) -> float | None:
    """Return the largest difference between llama.cpp's logits and those of the checkpoint.

    Returns:
        None when llama-cpp-python is not installed.

    Raises:
        CheckpointError: llama.cpp does not load the file, or computes something else.
    """
    try:
        llama_cpp = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError):
        return None

    def run(tokens_1T: Tensor) -> Tensor:
        try:
            model = llama_cpp.Llama(
                model_path=str(path),
                n_ctx=_VERIFY_CONTEXT,
                logits_all=True,
                n_gpu_layers=0,
                # A float32 cache (0 is GGML_TYPE_F32): the default rounds keys and values to float16.
                type_k=0,
                type_v=0,
                verbose=False,
            )
            model.eval(tokens_1T[0].tolist())
            logits = torch.tensor(model.scores[: tokens_1T.shape[1]])
            model.close()
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"llama.cpp does not run the exported file ({error}); it was not kept") from error
        return logits[None]  # [1, T, vocabulary]

    return verify(checkpoint, run, runtime="llama.cpp", dtype=dtype_name(dtype))
