"""GGUF files for llama.cpp.

llama.cpp runs layers of different head counts and FFN widths only in its architecture `deci`: arrays of sizes, one head
width W for all, groups of one size within a layer, softmax scale 1 / sqrt(W), and the two channels of a rotary pair
side by side. Families of which `deci` lacks something have an architecture of their own there, with one shape for all
layers. Whatever does not fit is zero-padded, which is exact. `gguf_plan` and `gguf_one_shape` say what the file holds.
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
from intraslice.exporters.gguf_one_shape import plan_one_shape
from intraslice.exporters.gguf_plan import SHAPE_PER_LAYER, FilePlan, plan_shapes
from intraslice.exporters.gguf_vocabulary import add_vocabulary
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.exporters.padding import pad_layer, scale_queries, with_output_biases
from intraslice.exporters.verify import verify
from intraslice.files import writing
from intraslice.layers.state_dict import norm_weights
from intraslice.names import expanded
from intraslice.placement import dtype_name
from intraslice.progress import Progress
from intraslice.runtime.families_intraslice import FamilySpec, LayerShape

MARK = "intraslice.pruned"
"""Key by which the files of this package are known again, whatever their architecture."""
_VERIFY_CONTEXT = 64
# Magic, version, two counts, the key and value of the architecture, and the mark.
_HEADER_BYTES = 160


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
    spec = checkpoint.spec
    if spec.llama_cpp_lacks and spec.llama_cpp is not None:
        plan = plan_one_shape(checkpoint, spec.llama_cpp, options)
    else:
        plan = plan_shapes(checkpoint, options)
    notes = list(plan.notes)
    rest = _rest(checkpoint, plan)
    rows = rest["token_embd.weight"].shape[0]
    with (
        staged_output(output, "export") as work,
        _closed(GGUFWriter(work.path / GGUF_FILE, plan.architecture)) as writer,
    ):
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
            difference = _verified(temporary, checkpoint, plan)
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
    # It may be the dense model of a checkpoint. Files of older releases have no mark, but no other architecture either.
    if MARK.encode() not in begins and SHAPE_PER_LAYER.encode() not in begins:
        raise OutputError(f"output {name} is not a GGUF file of a pruned model, so --overwrite does not replace it")


def _add_sizes(writer: Any, checkpoint: PrunedCheckpoint, plan: FilePlan, rows: int) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    values = vars(checkpoint.dense)
    file_types = {
        torch.float32: LlamaFileType.ALL_F32,
        torch.float16: LlamaFileType.MOSTLY_F16,
        torch.bfloat16: LlamaFileType.MOSTLY_BF16,
    }
    writer.add_bool(MARK, True)
    writer.add_type("model")
    writer.add_name(checkpoint.folder.resolve().name)
    writer.add_file_type(file_types[plan.dtype])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(plan.context_length)
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(checkpoint.num_layers)
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_rope_freq_base(plan.rope_base)
    writer.add_rope_dimension_count(plan.width)
    writer.add_key_length(plan.width)
    writer.add_value_length(plan.width)
    for method, value in plan.keys:
        getattr(writer, method)(value)
    sizes = [(shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size) for shape in plan.shapes]
    # One number says that all layers are alike.
    columns = zip(*sizes, strict=True) if plan.architecture == SHAPE_PER_LAYER else sizes[0]
    heads, kv_heads, ffn = (list(column) if isinstance(column, tuple) else column for column in columns)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(ffn)


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
    rest["output_norm.weight"] = _norm(checkpoint, rest["output_norm.weight"])
    if plan.own_head:
        rest.setdefault("output.weight", rest["token_embd.weight"])
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
        sizes = _layer_sizes(checkpoint, shape, plan.width)
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


def _norm(checkpoint: PrunedCheckpoint, weight: Tensor) -> Tensor:
    """Return the factor of a norm: files hold it whole where Hugging Face stores what is added to one."""
    offset = checkpoint.spec.norm_offset
    return weight if offset == 0.0 else weight.float() + offset


def _norm_names(spec: FamilySpec) -> dict[str, str]:
    """Return how files call the norms of a layer, by their modules within the layer."""
    names = {
        spec.attention_norm: "attn_norm",
        spec.attention_out_norm: "post_attention_norm",
        spec.ffn_norm: "ffn_norm",
        spec.ffn_out_norm: "post_ffw_norm",
    }
    return {f"{module}.weight": f"{name}.weight" for module, name in names.items() if module is not None}


def _layer_sizes(checkpoint: PrunedCheckpoint, shape: LayerShape, width: int) -> dict[str, tuple[int, ...]]:
    """Return the size of each tensor that a layer of this shape may have, by its name within the layer."""
    spec, hidden = checkpoint.spec, int(vars(checkpoint.dense)["hidden_size"])
    query, kv, ffn = shape.num_attention_heads * width, shape.num_key_value_heads * width, shape.intermediate_size
    sizes: dict[str, tuple[int, ...]] = {name: (hidden,) for name in _norm_names(spec).values()}
    if spec.qk_norm is not None:
        over_all = spec.qk_norm.over == "all"
        sizes["attn_q_norm.weight"] = (query if over_all else width,)
        sizes["attn_k_norm.weight"] = (kv if over_all else width,)
    rows = {"attn_q": query, "attn_k": kv, "attn_v": kv, "attn_output": hidden}
    rows |= {"ffn_gate": ffn, "ffn_up": ffn, "ffn_down": hidden}
    columns = {"attn_output": query, "ffn_down": ffn}
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
    norms = _norm_names(spec)
    if layer.rest.keys() != norms.keys():
        different = ", ".join(sorted(layer.rest.keys() ^ norms.keys()))
        raise CheckpointError(
            f"layer {index} of {checkpoint.name!r} does not hold what GGUF has a place for: {different}"
        )
    if checkpoint.has_output_biases:
        layer = with_output_biases(layer)
    attention, ffn = layer.attention, layer.ffn
    found: dict[str, Tensor | None] = {norms[name]: _norm(checkpoint, tensor) for name, tensor in layer.rest.items()}
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
        for name, weight in norm_weights(attention, spec, headed=False).items():
            side = "q" if spec.qk_norm is not None and name == f"{spec.qk_norm.q}.weight" else "k"
            found[f"attn_{side}_norm.weight"] = _norm(checkpoint, weight)
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


def _verified(path: Path, checkpoint: PrunedCheckpoint, plan: FilePlan) -> float | None:
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

    return verify(
        checkpoint, run, runtime="llama.cpp", dtype=dtype_name(plan.dtype), context_length=plan.context_length
    )
