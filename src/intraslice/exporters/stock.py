"""Plain Hugging Face checkpoints, without code of ours: one shape for all layers, rotary pairs shared by all heads.

Exact. The softmax scale of the dense head is folded into the queries, and the frequencies of a subset of rotary pairs
are written as factors of the "longrope" type, which every stock class reads.

Shapes: d head_dim of the dense model, W head width of the export.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from intraslice.border import foreign
from intraslice.checkpoint.pruned import PrunedCheckpoint
from intraslice.checkpoint.tensorfile import write_tensors
from intraslice.checkpoint.workfolder import staged_output
from intraslice.checkpoint.writer import assemble, check_output, save_side_files
from intraslice.errors import CheckpointError, UnsupportedModelError, one_line
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.exporters.padding import pad_layer, padding_cost, scale_queries, with_all_biases
from intraslice.exporters.rope import dense_frequencies, rope_type
from intraslice.exporters.verify import verify
from intraslice.files import write_text
from intraslice.layers.state_dict import NeutralLayer, join_layer
from intraslice.placement import dtype_from_name
from intraslice.progress import Progress
from intraslice.runtime.configuration_intraslice import rotary_dim, stock_config_class
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from intraslice.runtime.modeling_intraslice import causal_lm_class

_SHARD_BYTES = 1 << 30
# Fields of a config that belong to one class or file.
_NOT_CARRIED_OVER = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")


def export_stock(
    checkpoint: PrunedCheckpoint, output: Path, options: ExportOptions, progress: Progress
) -> ExportReport:
    """Write a checkpoint whose layers have one shape as the stock class of its family.

    Args:
        checkpoint: the pruned checkpoint.
        output: folder to write.
        options: settings.
        progress: shows the layers.

    Raises:
        UnsupportedModelError: the shapes cannot be expressed; the message says why and what padding would cost.
    """
    _check_expressible(checkpoint)
    pairs = checkpoint.shared_pairs()
    return write_stock(checkpoint, checkpoint.shapes[0], pairs, output, options, progress, to="stock")


def _check_expressible(checkpoint: PrunedCheckpoint) -> None:
    shapes = checkpoint.shapes
    different = len(set(shapes))
    ragged = sum(len(set(shape.heads_per_kv)) > 1 for shape in shapes)
    bare = [index for index, shape in enumerate(shapes) if shape.dropped]
    if bare:
        reason = f"layer {bare[0]} has no {' and no '.join(shapes[bare[0]].dropped)}, which every stock layer has"
    elif different > 1:
        reason = f"its {len(shapes)} layers have {different} different shapes, and stock classes know only one"
    elif ragged:
        reason = "its kv heads serve different numbers of query heads"
    elif shapes[0].qk_head_dim != shapes[0].v_head_dim:
        reason = f"query/key heads are {shapes[0].qk_head_dim} wide and value heads {shapes[0].v_head_dim}"
    elif any(checkpoint.rotated) and checkpoint.shared_pairs() is None:
        reason = "its heads keep different rotary pairs, and stock classes rotate all heads alike"
    else:
        return
    cost = padding_cost(checkpoint, (checkpoint.dense_shape,) * len(shapes))
    never = checkpoint.spec.without_targets.get("stock")
    way = (
        "prune with --target stock, or use" if never is None else f"--target stock is no way out, because {never}; use"
    )
    raise UnsupportedModelError(
        f"{checkpoint.name!r} cannot become a stock model: {reason}; {way} --to padded "
        f"(exact, but {cost:+.0%} decoder weights)."
    )


def write_stock(
    checkpoint: PrunedCheckpoint,
    shape: LayerShape,
    pairs: Sequence[int] | None,
    output: Path,
    options: ExportOptions,
    progress: Progress,
    *,
    to: str,
    notes: tuple[str, ...] = (),
) -> ExportReport:
    """Write every layer, zero-padded to `shape`, as the stock class of the family.

    Args:
        checkpoint: the pruned checkpoint.
        shape: of every layer of the export.
        pairs: rotary pairs that its heads have; None: those of the dense head.
        output: folder to write.
        options: settings.
        progress: shows the layers.
        to: name of the exporter, for the report.
        notes: remarks for the report.
    """
    started = time.monotonic()
    dense_width = checkpoint.dense_shape.qk_head_dim
    if pairs is not None and len(pairs) == dense_width // 2:
        pairs = None
    config = stock_config(checkpoint, shape, pairs)
    factor = 1.0 if checkpoint.spec.fixed_scale else (shape.qk_head_dim / dense_width) ** 0.5
    check_output(output, options.overwrite, source=checkpoint.folder)
    with staged_output(output, "export") as work:
        staging, layers = work.staging, work.path / "layers"
        files: list[Path] = []
        dtype = None if options.dtype == "auto" else dtype_from_name(options.dtype)
        with progress.step(f"export to {to}", checkpoint.num_layers) as advance:
            for index in range(checkpoint.num_layers):
                layer = checkpoint.load_layer(index)
                stored = layer.attention.q.dtype
                padded = scale_queries(_padded(layer, shape, checkpoint.pair_channels(index), pairs), factor)
                if checkpoint.has_output_biases:
                    padded = with_all_biases(padded)
                tensors = join_layer(padded)
                tensors = {name: tensor.to(dtype or stored) for name, tensor in tensors.items()}
                files.append(layers / f"{index:05d}.safetensors")
                write_tensors(files[-1], tensors)
                advance(1)
        rest = {name: tensor.to(dtype or tensor.dtype) for name, tensor in checkpoint.load_rest().items()}
        config.dtype = dtype or next(iter(rest.values())).dtype
        prefixes = [checkpoint.layer_prefix(index) for index in range(checkpoint.num_layers)]
        assemble(staging, files, prefixes, rest, _SHARD_BYTES)
        del rest
        save_side_files(staging, config, checkpoint.folder, runtime_files=False)
        _write_both_rope_forms(staging / "config.json")
        difference = _verified(checkpoint, staging, options.dtype) if options.verify else None
        work.publish(options.overwrite)
    return ExportReport(
        to=to,
        output=str(output),
        notes=notes,
        max_logit_difference=difference,
        seconds=time.monotonic() - started,
    )


def _padded(
    layer: NeutralLayer, shape: LayerShape, pair_channels: Tensor | None, pairs: Sequence[int] | None
) -> NeutralLayer:
    if layer.shape == shape:
        # Nothing to scatter; rows of q and k are in the order of the shared pairs already.
        return layer
    return pad_layer(layer, shape, pair_channels, pairs)


def stock_config(checkpoint: PrunedCheckpoint, shape: LayerShape, pairs: Sequence[int] | None) -> Any:
    """Return the config of the stock class for one shape of all layers.

    Args:
        checkpoint: the pruned checkpoint.
        shape: of every layer.
        pairs: rotary pairs of every head; None: those of the dense head.

    Raises:
        UnsupportedModelError: the stock classes cannot have this shape.
    """
    dense, spec = checkpoint.dense, checkpoint.spec
    values = {name: value for name, value in dense.to_dict().items() if name not in _NOT_CARRIED_OVER}
    heads, width = shape.num_attention_heads, shape.qk_head_dim
    values["num_attention_heads"] = heads
    values[spec.intermediate_size] = shape.intermediate_size
    if spec.kv_heads in vars(dense):
        values[spec.kv_heads] = shape.num_key_value_heads
    if spec.head_dim_field:
        values["head_dim"] = width
    elif heads * width != dense.hidden_size:
        raise UnsupportedModelError(
            f"the {spec.name} class has heads of hidden_size / num_attention_heads = {dense.hidden_size} / {heads} "
            f"channels, not of {width}; use --to padded."
        )
    if checkpoint.has_output_biases:
        if not spec.bias_fields:
            raise UnsupportedModelError(
                f"{checkpoint.name!r} has biases on o_proj and down_proj, for which the {spec.name} class has no "
                "place; load it with transformers or vLLM as it is, or prune with a method whose repair adds none."
            )
        values |= dict.fromkeys(spec.bias_fields, True)
    if pairs is not None:
        values["rope_parameters"] = _subset_rope(checkpoint, pairs)
    kind: Any = type(dense)
    if spec.heads_divide_hidden and dense.hidden_size % heads:
        biased = [values.pop(name, False) for name in spec.bias_fields]
        if spec.stand_in is None or any(biased):
            raise UnsupportedModelError(
                f"{kind.__name__} refuses {heads} heads, because they do not divide hidden_size {dense.hidden_size}, "
                "and with biases no other stock class fits; prune with --target stock, or use --to padded."
            )
        # The same computation, without that check.
        kind = stock_config_class(spec.stand_in)
        window = FAMILIES[spec.stand_in].sliding_window
        values |= {} if window is None else {window: None}
    if spec.head_of is not None:
        # transformers has no class for the text tower alone. Without images the three positions of a token are one.
        kind = stock_config_class(spec.head_of)
        rope = values["rope_parameters"]
        values["rope_parameters"] = {name: value for name, value in rope.items() if not name.startswith("mrope_")}
    try:
        return kind(**values, architectures=[causal_lm_class(kind.model_type).__name__])
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"{kind.__name__} refuses heads of {width} channels with a subset of the rotary pairs "
            f"({one_line(error)}); use --to padded."
        ) from error


def _subset_rope(checkpoint: PrunedCheckpoint, pairs: Sequence[int]) -> dict[str, Any]:
    """Return rope parameters that give pair j of a head the frequency of dense pair pairs[j].

    longrope divides base^(-2j/W) by a factor for each j, so the factor is base^(-2j/W) over the wanted frequency.
    """
    frequencies = dense_frequencies(checkpoint)
    if frequencies is None:
        raise UnsupportedModelError(
            f"the rotary frequencies of type {rope_type(checkpoint)!r} change with the length of the text, so a "
            "subset of the pairs cannot be written as constants; prune with attention.heads=whole, or use "
            "--to padded."
        )
    if rotary_dim(checkpoint.dense) != checkpoint.dense_shape.qk_head_dim:
        raise UnsupportedModelError("a head that is only partly rotated cannot be written as a subset of rotary pairs.")
    inv_freq, attention_factor = frequencies
    base = float(vars(checkpoint.dense)["rope_parameters"]["rope_theta"])
    count = len(pairs)
    plain = base ** (-torch.arange(count, dtype=torch.float64) / count)
    factors = (plain / inv_freq[list(pairs)]).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": attention_factor,
        "original_max_position_embeddings": checkpoint.dense.max_position_embeddings,
    }


def _write_both_rope_forms(path: Path) -> None:
    """Add the RoPE keys of older readers: without rope_theta they silently take the default angles."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rope = data.get("rope_parameters")
    if rope and "rope_theta" in rope:
        # Parameters per layer type never had an older form.
        data["rope_theta"] = rope["rope_theta"]
        data["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def _verified(checkpoint: PrunedCheckpoint, folder: Path, dtype: str) -> float:
    from transformers import AutoModelForCausalLM

    def run(tokens_1T: Tensor) -> Tensor:
        with foreign("transformers cannot load the export", CheckpointError):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
        return model(tokens_1T).logits

    return verify(checkpoint, run, runtime="transformers", dtype=dtype)
