"""The shape of a model, layer by layer, from its config alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from intraslice.border import foreign
from intraslice.checkpoint.composite import is_composite, text_config
from intraslice.checkpoint.config_file import read_config_data
from intraslice.checkpoint.folder import check_family, composite_reason, is_pruned_config
from intraslice.checkpoint.ownership import Verification, check_intact, verify_folder
from intraslice.checkpoint.shipped_code import CodeState, code_in
from intraslice.errors import CheckpointError, UnsupportedModelError
from intraslice.loading import count_parameters, load_whole_config
from intraslice.names import NameKind, expanded, kind_of
from intraslice.options import RunOptions
from intraslice.placement import choose_device, dtype_from_name, peak_resident_bytes
from intraslice.quiet import quiet
from intraslice.results.result import RESULT_FILE, PruneResult
from intraslice.runtime.configuration_intraslice import MODEL_TYPE_PREFIX, dense_config, dense_shapes
from intraslice.runtime.families_intraslice import FAMILIES, FamilySpec, LayerShape


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One decoder layer.

    Attributes:
        layer: its index.
        shape: its heads, widths and channels.
        num_parameters: its linear weights.
        kept: num_parameters over those of the dense layer.
        errors: by the name of the site, the relative error of its output when it was pruned, as far as known.
    """

    layer: int
    shape: LayerShape
    num_parameters: int
    kept: float
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A whole model.

    Attributes:
        model: as it was named.
        family: name of the layout, for example "llama"; of a composite model that of its text tower, which all sizes
            but num_parameters and weight_bytes are about.
        composite: architecture of the whole where this is a composite model, for example "mistral3"; else None.
        method: how it was pruned; None for a dense model.
        sparsity: removed fraction of the decoder layers' linear weights.
        hidden_size: width of the residual stream.
        dense_hidden_size: the same of the dense model.
        vocab_size: number of token ids.
        num_parameters: all parameters, tied ones once.
        dense_layer_parameters: linear weights of the decoder layers of the dense model.
        layer_parameters: linear weights of the decoder layers as they are.
        weight_bytes: size of the weight files; 0 when they are not on this machine.
        layers: one entry a layer.
        code: whether the folder holds code: "none", "shipped" (the files of this release, as they travel with a pruned
            model) or "other"; None when there is no folder on this machine.
        code_digest: sha256 of that code; "" when there is none.
    """

    model: str
    family: str
    method: str | None
    sparsity: float
    hidden_size: int
    dense_hidden_size: int
    vocab_size: int
    num_parameters: int
    dense_layer_parameters: int
    layer_parameters: int
    weight_bytes: int
    layers: tuple[LayerInfo, ...]
    composite: str | None = None
    code: CodeState | None = None
    code_digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def inspect_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelInfo:
    """Describe a dense or pruned model without loading its weights.

    Args:
        name: hub id, folder, .gguf file or built-in name.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code that comes with the model may be executed.

    Raises:
        CheckpointError: there is no such model.
        UnsupportedModelError: it cannot be pruned; the message says what is missing.
    """
    if kind_of(name) is NameKind.FOLDER:
        # Before transformers reads it, which says less of an architecture that it does not know.
        _check_dense(read_config_data(expanded(name), name), name)
    whole_config, files = load_whole_config(name, revision=revision, trust_remote_code=trust_remote_code)
    _check_dense(whole_config.to_dict(), name)
    with foreign(f"config.json of {name!r} is not valid", CheckpointError):
        spec = family_of(whole_config)
        config = text_config(whole_config)
    pruned = config.model_type.startswith(MODEL_TYPE_PREFIX)
    composite = is_composite(whole_config)
    auto: Any = AutoModelForImageTextToText if composite else AutoModelForCausalLM
    with foreign(f"config.json of {name!r} is not valid", CheckpointError):
        whole = dense_shapes(config, spec)
        hidden_size = config.hidden_size
        shapes = config.layer_shapes if pruned else whole
        dense_hidden_size = dense_config(config).hidden_size if pruned else hidden_size
        dense_sizes = [spec.num_parameters(shape, dense_hidden_size) for shape in whole]
        sizes = [spec.num_parameters(shape, hidden_size) for shape in shapes]
        with torch.device("meta"), quiet("transformers"):
            skeleton = auto.from_config(whole_config, trust_remote_code=trust_remote_code)
        if min(dense_sizes) < 1:
            raise ValueError(f"layer {dense_sizes.index(min(dense_sizes))} has no weights")
    errors = _errors(expanded(name))
    code, digest = code_in(expanded(name)) if kind_of(name) is NameKind.FOLDER else (None, "")
    layers = tuple(
        LayerInfo(
            layer=layer,
            shape=shape,
            num_parameters=size,
            kept=size / dense_size,
            errors=errors.get(layer, {}),
        )
        for layer, (shape, size, dense_size) in enumerate(zip(shapes, sizes, dense_sizes, strict=True))
    )
    return ModelInfo(
        model=name,
        family=spec.name,
        composite=whole_config.model_type.removeprefix(MODEL_TYPE_PREFIX) if composite else None,
        method=config.intraslice["method"] if pruned and config.intraslice is not None else None,
        sparsity=1 - sum(sizes) / sum(dense_sizes),
        hidden_size=hidden_size,
        dense_hidden_size=dense_hidden_size,
        vocab_size=config.vocab_size,
        num_parameters=count_parameters(skeleton),
        dense_layer_parameters=sum(dense_sizes),
        layer_parameters=sum(sizes),
        weight_bytes=sum(file.stat().st_size for file in files),
        layers=layers,
        code=code,
        code_digest=digest,
    )


def verify_model(name: str) -> Verification:
    """Compare every file of a checkpoint with what was written.

    Args:
        name: folder of a checkpoint, or of what was exported or healed.

    Raises:
        CheckpointError: a file has changed or is missing, or the folder does not say what was written.
    """
    folder = expanded(name)
    if not folder.is_dir():
        raise CheckpointError(f"{name!r} is no folder, so that there is nothing to verify; give a checkpoint folder.")
    check_intact(folder, name)
    found = verify_folder(folder, name)
    problems = [f"{file!r} of {name!r} is not what was written" for file in found.changed]
    problems += [f"{file!r} of {name!r} is missing" for file in found.missing]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[0]}{more}; the weights are what was written.")
    return found


def _check_dense(data: dict[str, Any], name: str) -> None:
    if not is_pruned_config(data):
        check_family(data, name)


def family_of(config: Any) -> FamilySpec:
    """Return the spec of a dense or pruned config.

    Raises:
        UnsupportedModelError: the architecture is not one of ours.
    """
    name = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    tower = getattr(config, "text_config", None)
    own = config if tower is None else tower
    if tower is not None:
        text_type = tower.model_type.removeprefix(MODEL_TYPE_PREFIX)
        reason = composite_reason(name, text_type)
        if reason is not None:
            raise UnsupportedModelError(f"this model {reason}")
        name = text_type
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {name!r} is not supported; supported are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[name].of_config(own)


def _errors(folder: Path) -> dict[int, dict[str, float]]:
    if not (folder / RESULT_FILE).is_file():
        return {}
    return {record.layer: record.errors for record in PruneResult.load(folder).layers}


def compute_width(run: RunOptions) -> int:
    """Return the bytes of a number that a prune computes with."""
    on_cpu = choose_device(run.device).type == "cpu"
    return 4 if on_cpu or run.dtype in ("auto", "float32") else dtype_from_name(run.dtype).itemsize


def estimate_peak_bytes(info: ModelInfo, num_samples: int, seqlen: int, run: RunOptions) -> int:
    """Estimate the peak memory of pruning a model, in bytes; the order of magnitude, not a promise.

    Counted: the process as it is now, embeddings, one layer twice (dense and pruned), the second moments of
    `act` and of `context` with the copies of a solve, hidden states, layer boundaries of the gradient pass,
    activations and logits of one batch.
    """
    on_cpu = choose_device(run.device).type == "cpu"
    width = compute_width(run)
    tokens = num_samples * seqlen
    largest = max(info.layers, key=lambda layer: layer.num_parameters)
    shape = largest.shape
    context = shape.num_attention_heads * shape.v_head_dim
    stream = tokens * info.hidden_size * width
    hidden_states = 2 * stream  # of the pruned and of the dense model
    batch_tokens = max(run.batch_tokens, seqlen)
    solve_copies = 4
    parts = {
        "process": peak_resident_bytes() if on_cpu else 0,
        "embeddings": info.vocab_size * info.hidden_size * width,
        "layer": 2 * largest.num_parameters * width,
        "moments": 8 * solve_copies * (shape.intermediate_size**2 + context**2),
        "hidden_states": hidden_states if run.hidden_states == "memory" else 0,
        "boundaries": min(run.boundary_bytes, len(info.layers) * stream),
        "batch": batch_tokens * (2 * info.vocab_size + 6 * shape.intermediate_size + 8 * context) * width,
    }
    return sum(parts.values())
