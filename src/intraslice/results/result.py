"""What a prune leaves behind to read: the typed content of result.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from intraslice.border import check_schema, read_json
from intraslice.errors import CheckpointError
from intraslice.results.healing import HealingRecord
from intraslice.results.sites import OLD_FIELDS
from intraslice.runtime.families_intraslice import LayerShape

RESULT_FILE = "result.json"


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One finished layer.

    Attributes:
        layer: index of the decoder layer.
        shape: what the layer is now.
        num_parameters: stored linear weights of the layer.
        errors: by the name of the site, ||Y - output||^2 / ||Y||^2 on the calibration tokens, with Y what the site was
            repaired against (options attention.repair_against and ffn.repair_against) on the inputs that the pruned
            model gives it.
        heads: kept query heads, by their number in the dense model.
        seconds: wall-clock seconds spent on the layer.
        iter_pca: whether Eq. 7 was applied to its FFN.
        distilled: by the name of the site, what local distillation made of its relative error on the sequences that it
            held out: the error before and after. `errors` are those before, on all sequences.
    """

    layer: int
    shape: LayerShape
    num_parameters: int
    errors: dict[str, float]
    heads: tuple[int, ...]
    seconds: float
    iter_pca: bool = False
    distilled: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What training all layers together has changed.

    Attributes:
        before: mean KL divergence of the predictions of the dense model from those of the pruned one, in nats, on the
            calibration sequences that were held out, before the first step.
        after: the same for the weights that are kept; no larger.
        step: the step that they are from; 0 when none was better.
        steps: in all.
    """

    before: float
    after: float
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """The whole run.

    Attributes:
        output: folder of the checkpoint.
        model: what was given as the model.
        family: name of the layout, for example "llama".
        method: name of the method.
        requested_sparsity: what was asked for.
        sparsity: removed fraction of the decoder layers' linear weights, counted on the stored tensors.
        dense_layer_parameters: linear weights of the dense decoder layers.
        pruned_layer_parameters: linear weights of the pruned decoder layers.
        dense_parameters: all parameters of the dense model (tied tensors once).
        pruned_parameters: all parameters of the pruned model (tied tensors once).
        dense_bytes: bytes of the dense weight tensors in the dtype of the output.
        pruned_bytes: bytes of the weight files written.
        layers: one record per layer.
        seconds: wall-clock seconds by stage ("plan", "layers", "tune", "finish", "write"); "total" includes the time
            that interrupted runs spent before.
        peak_memory_bytes: peak resident memory of the process (CPU), or of the accelerator when one was used.
        calibration: name, num_samples, seqlen, seed, fingerprint.
        versions: of intraslice, torch, transformers, python.
        device: where it ran.
        dtype: of the saved weights.
        recipe: the full recipe.
        command: the command line, or the Python call.
        tuned: what training all layers together has changed; None where the method did not.
        healing: how the weights were trained afterwards, if they were.
    """

    output: str
    model: str
    family: str
    method: str
    requested_sparsity: float
    sparsity: float
    dense_layer_parameters: int
    pruned_layer_parameters: int
    dense_parameters: int
    pruned_parameters: int
    dense_bytes: int
    pruned_bytes: int
    layers: tuple[LayerRecord, ...]
    seconds: dict[str, float]
    peak_memory_bytes: int
    calibration: dict[str, Any]
    versions: dict[str, str]
    device: str
    dtype: str
    recipe: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    tuned: Tuned | None = None
    healing: HealingRecord | None = None

    def with_seconds(self, seconds: dict[str, float]) -> PruneResult:
        """Return the result with other seconds."""
        return replace(self, seconds=seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return json.loads(json.dumps(asdict(self)))

    def to_json(self) -> str:
        """Return the content of result.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PruneResult:
        """Inverse of `to_dict`."""
        layers = tuple(layer_record_from_dict(record) for record in data["layers"])
        healing, tuned = data.get("healing"), data.get("tuned")
        return cls(
            **{
                **data,
                "layers": layers,
                "tuned": tuned and Tuned(**tuned),
                "healing": healing and HealingRecord.from_dict(healing),
            }
        )

    @classmethod
    def load(cls, folder: str | Path) -> PruneResult:
        """Read result.json of a pruned checkpoint.

        Raises:
            CheckpointError: there is none, or it does not hold what a prune records.
        """
        path = Path(folder) / RESULT_FILE
        what = f"{RESULT_FILE} of {str(folder)!r}"
        return cls.from_foreign(read_json(path, what, CheckpointError), what)

    @classmethod
    def from_foreign(cls, data: dict[str, Any], what: str) -> PruneResult:
        """Return the content of a result.json that somebody else may have written, of this release or of 0.1.

        Args:
            data: its content.
            what: how messages call it.

        Raises:
            CheckpointError: it does not hold what a prune records.
        """
        layers = data.get("layers")
        records = [_with_errors(layer) for layer in layers] if isinstance(layers, list) else layers
        return check_schema(cls, {**data, "layers": records}, what, CheckpointError)


def layer_record_from_dict(data: dict[str, Any]) -> LayerRecord:
    """Rebuild a `LayerRecord` from its JSON form, of this release or of 0.1, which knew two sites by name."""
    values = dict(_with_errors(data))
    shape = LayerShape.from_dict(values["shape"])
    distilled = {site: tuple(errors) for site, errors in values.pop("distilled", {}).items()}
    return LayerRecord(**{**values, "shape": shape, "heads": tuple(values["heads"]), "distilled": distilled})


def _with_errors(record: Any) -> Any:
    """Return the record of a layer with its errors by site, as 0.1 did not write them."""
    if not isinstance(record, dict) or "errors" in record:
        return record
    values = {name: value for name, value in record.items() if name not in OLD_FIELDS}
    return {**values, "errors": {site: record.get(name) for name, site in OLD_FIELDS.items()}}
