"""ONNX: one graph that reads a prompt, one that adds a token, and one file with the weights of both.

Inputs and outputs: input_ids [batch, T] -> logits [batch, T, vocabulary] and, for each layer i with attention,
`present.{i}.key` [batch, K_i, T, qk_head_dim_i] and `present.{i}.value` [batch, K_i, T, v_head_dim_i]. The decode graph
takes one token and the presents of the step before, as `past.{i}.key` and `past.{i}.value`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.checkpoint.workfolder import staged_output
from intraslice.checkpoint.writer import check_output, save_side_files
from intraslice.errors import MissingExtraError, UnsupportedModelError, one_line
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.exporters.rope import rope_type
from intraslice.exporters.verify import verify
from intraslice.files import writing
from intraslice.loading import load_model
from intraslice.placement import dtype_from_name
from intraslice.progress import Progress
from intraslice.quiet import quiet
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT

PREFILL_FILE = "prefill.onnx"
DECODE_FILE = "decode.onnx"
WEIGHTS_FILE = "weights.onnx.data"

_DTYPES = {"auto": "float32", "float32": "float32", "float16": "float16"}
_DECODE_STEPS = 3
# Smaller constants stay in the graph, where tools can see them.
_EXTERNAL_BYTES = 1024
_ALIGNMENT = 64
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def export_onnx(checkpoint: PrunedCheckpoint, output: Path, options: ExportOptions, progress: Progress) -> ExportReport:
    """Write a folder that onnxruntime runs: two graphs, their weights, config and tokenizer.

    Args:
        checkpoint: what to export.
        output: folder to write.
        options: dtype "auto" means float32, whatever the checkpoint has; CPU runtimes have no bfloat16 kernels.
        progress: shows the steps.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        UnsupportedModelError: the model or the dtype has no ONNX form.
        CheckpointError: the checkpoint is damaged, or the graphs compute something else than it does.
        OutputError: the output exists or cannot be written.
    """
    started = time.perf_counter()
    dtype = _checked_dtype(options.dtype)
    _check_rope(checkpoint)
    for package in ("onnx", "onnxscript"):
        _require(package)
    notes = [
        f"{PREFILL_FILE} and {DECODE_FILE} share the weights in {WEIGHTS_FILE}; keep the three files together.",
        "the graphs take no padding mask, so the prompts of a batch must have one length.",
    ]
    if _has_window(checkpoint):
        notes.append("layers with a sliding window return all keys and values; cut older ones off to save memory.")
    difference = None
    check_output(output, options.overwrite, source=checkpoint.folder)
    with staged_output(output, "export") as work:
        folder = work.staging
        with progress.step("export to ONNX", 4) as advance:
            model = load_model(str(checkpoint.folder), dtype=dtype, device="cpu")[0]
            model.requires_grad_(False)
            with writing(folder), (folder / WEIGHTS_FILE).open("wb") as file:
                weights = _SharedWeights(file)
                for name, decode in ((PREFILL_FILE, False), (DECODE_FILE, True)):
                    graph = _trace(model, checkpoint, decode)
                    advance(1)
                    _save_graph(graph, folder / name, weights)
            # Verification loads the checkpoint again; one copy of the weights at a time is enough.
            del graph, model
            config = copy.deepcopy(checkpoint.config)
            config.dtype = dtype_from_name(dtype)
            save_side_files(folder, config, checkpoint.folder)
            advance(1)
            if options.verify and _can_verify():
                difference = _verified(checkpoint, folder, dtype)
            elif options.verify:
                notes.append("not verified: onnxruntime is not installed; pip install 'intraslice[onnx]' brings it.")
            work.publish(options.overwrite)
            advance(1)
    return ExportReport(
        to="onnx",
        output=str(output),
        notes=tuple(notes),
        max_logit_difference=difference,
        seconds=time.perf_counter() - started,
    )


def _checked_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise UnsupportedModelError(
            f"ONNX graphs in {name} do not run on CPUs (onnxruntime has no kernels for it); choose float32 or float16."
        )
    return _DTYPES[name]


def _has_window(checkpoint: PrunedCheckpoint) -> bool:
    field = checkpoint.spec.sliding_window
    kinds = getattr(checkpoint.dense, "layer_types", None) or ["sliding_attention"]
    return field is not None and getattr(checkpoint.dense, field, None) is not None and "sliding_attention" in kinds


def _check_rope(checkpoint: PrunedCheckpoint) -> None:
    kind = rope_type(checkpoint)
    if any(checkpoint.rotated) and kind in _LENGTH_DEPENDENT_ROPE:
        raise UnsupportedModelError(
            f"{checkpoint.name!r} has RoPE of type {kind!r}, whose angles change with the length of the text; an ONNX "
            "graph is fixed. Use the checkpoint with transformers or vLLM instead."
        )


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"the ONNX export needs the package {package} ({one_line(error)}); pip install 'intraslice[onnx]'"
        ) from error


def _can_verify() -> bool:
    try:
        importlib.import_module("onnxruntime")
    except ImportError:
        return False
    return True


class _Step(nn.Module):
    """The model with its cache taken apart into plain tensors."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, input_ids: Tensor, past: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        # Without the config no layer forgets what is outside its sliding window: the mask hides it anyway, and each
        # layer has the same length.
        cache: Any = DynamicCache()
        if past and 0 not in self.layers:
            # Tokens are counted in the first layer, also where it has no attention.
            B, _, S, _ = past[0].shape
            token_B1S1 = past[0].new_zeros(B, 1, S, 1)
            cache.update(token_B1S1, token_B1S1, 0)
        # Nothing is past in the prefill graph.
        for layer, key, value in zip(self.layers, past[::2], past[1::2], strict=False):
            cache.update(key, value, layer)
        logits = self.model(input_ids=input_ids, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
        kept = [cache.layers[layer] for layer in self.layers]
        return (logits, *(tensor for layer in kept for tensor in (layer.keys, layer.values)))


def _attending(checkpoint: PrunedCheckpoint) -> list[int]:
    """Return the numbers of the layers with attention."""
    return [index for index, shape in enumerate(checkpoint.shapes) if shape.has_attention]


def _cache_names(prefix: str, checkpoint: PrunedCheckpoint) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in _attending(checkpoint) for part in ("key", "value")]


def _trace(model: Any, checkpoint: PrunedCheckpoint, decode: bool) -> Any:
    """Return one graph as an onnx_ir model whose weights are those of `model`, not copies."""
    # Sizes of 1 would be taken for constants.
    batch, length = 2, 3
    sizes: dict[str, Any] = {name: torch.export.Dim(name) for name in ("batch", "sequence", "past")}
    if decode:
        past: list[Tensor] = []
        for shape in (checkpoint.shapes[layer] for layer in _attending(checkpoint)):
            for width in (shape.qk_head_dim, shape.v_head_dim):
                past.append(torch.zeros(batch, shape.num_key_value_heads, length, width, dtype=model.dtype))
        arguments: tuple[Any, ...] = (torch.zeros(batch, 1, dtype=torch.int64), past)
        dynamic: dict[str, Any] = {
            "input_ids": {0: sizes["batch"]},
            "past": [{0: sizes["batch"], 2: sizes["past"]}] * len(past),
        }
    else:
        arguments = (torch.zeros(batch, length, dtype=torch.int64),)
        dynamic = {"input_ids": {0: sizes["batch"], 1: sizes["sequence"]}}
    # The exporter and its libraries talk about their own code.
    with quiet(everything=True):
        try:
            program: Any = torch.onnx.export(
                _Step(model, _attending(checkpoint)),
                arguments,
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=["input_ids", *(_cache_names("past", checkpoint) if decode else ())],
                output_names=["logits", *_cache_names("present", checkpoint)],
                verbose=False,
            )
        # The base class of everything that the exporter and its passes raise.
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"torch {torch.__version__} cannot write {checkpoint.name!r} as an ONNX graph ({one_line(error)}); "
                "another release of torch or onnxscript may."
            ) from error
    return program.model


class _SharedWeights:
    """The file with the weights of all graphs; what is there already is not written again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets: dict[bytes, int] = {}

    def place(self, data: memoryview) -> int:
        """Return where these bytes begin in the file."""
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._offsets[key] = self._file.tell()
            self._file.write(data)
        return self._offsets[key]


def _save_graph(graph: Any, path: Path, weights: _SharedWeights) -> None:
    import numpy
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # Every node carries the stack it was traced from, with the paths of this machine.
    ClearMetadataAndDocStringPass()(graph)
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if tensor.nbytes < _EXTERNAL_BYTES:
            continue
        data = numpy.ascontiguousarray(tensor.numpy()).reshape(-1).view(numpy.uint8).data
        value.const_value = onnx_ir.ExternalTensor(
            WEIGHTS_FILE,
            weights.place(data),
            data.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=value.name,
            base_dir=path.parent,
        )
    onnx_ir.save(graph, path)


def _verified(checkpoint: PrunedCheckpoint, folder: Path, dtype: str) -> float:
    """Return the largest difference of a logit over a prompt and some single tokens after it."""
    import onnxruntime

    def session(name: str) -> Any:
        wanted = onnxruntime.SessionOptions()
        # Errors only.
        wanted.log_severity_level = 3
        return onnxruntime.InferenceSession(folder / name, wanted, providers=["CPUExecutionProvider"])

    def run(tokens_1T: Tensor) -> Tensor:
        split = tokens_1T.shape[1] - _DECODE_STEPS
        logits, *cache = session(PREFILL_FILE).run(None, {"input_ids": tokens_1T[:, :split].numpy()})
        found = [logits]
        decode = session(DECODE_FILE)
        for position in range(split, tokens_1T.shape[1]):
            feeds = dict(zip(_cache_names("past", checkpoint), cache, strict=True))
            logits, *cache = decode.run(None, {"input_ids": tokens_1T[:, position : position + 1].numpy(), **feeds})
            found.append(logits)
        return torch.cat([torch.from_numpy(part).float() for part in found], dim=1)  # [1, T, vocabulary]

    return verify(checkpoint, run, runtime="onnxruntime", dtype=dtype)
