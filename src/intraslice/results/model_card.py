"""The README.md that travels with a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from intraslice.names import NameKind, kind_of
from intraslice.results.result import PruneResult
from intraslice.results.sites import list_sites, site_title

# Order of the fields in the card.
_HEAD = ["library_name", "pipeline_tag", "tags", "base_model"]


def render(result: PruneResult, *, composite: bool = False) -> str:
    """Return the model card of a finished run, as Markdown with a YAML head.

    Args:
        result: of the run.
        composite: whether the model has other towers beside the text tower, which was pruned.
    """
    base = _hub_id(result.model)
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if composite else "text-generation",
        tags=["intraslice", "pruned", result.family],
        base_model=base,
    )
    sections = (
        f"---\n{head.to_yaml(original_order=_HEAD)}\n---",
        f"# {Path(result.output).name}",
        f"`{_shown_model(result)}` with {100 * result.sparsity:.1f} % of its decoder weights removed by "
        f"intraslice (method `{result.method}`). The weights are really smaller: {_what_is_gone(result)}, nothing is "
        "masked or padded." + (" Everything outside of the text tower is unchanged." if composite else ""),
        _numbers(result),
        _loading(result, composite),
        _layers(result),
        _made(result),
        *_tuned(result),
        *_healed(result),
    )
    return "\n\n".join(sections) + "\n"


def _hub_id(model: str) -> str | None:
    return model if model.count("/") == 1 and kind_of(model) is NameKind.HUB else None


def _shown_model(result: PruneResult) -> str:
    # The full path of a local model says more about a machine than about the model.
    return _hub_id(result.model) or Path(result.model).name


def _what_is_gone(result: PruneResult) -> str:
    shape = result.layers[0].shape
    if shape.ranks:
        return "each weight of the decoder layers is stored as two factors (ranks in `result.json`)"
    if shape.shortcuts:
        return (
            "the residual stream is rotated and its last directions are deleted (the matrices that this adds to the "
            "residual connections are counted; embeddings and output head are narrower too, and stored apart even "
            "where the dense model ties them)"
        )
    return "heads, head dimensions and FFN channels are gone"


def _numbers(result: PruneResult) -> str:
    rows = (
        ("parameters", f"{result.dense_parameters:,}", f"{result.pruned_parameters:,}"),
        ("in decoder layers", f"{result.dense_layer_parameters:,}", f"{result.pruned_layer_parameters:,}"),
        ("weight bytes", f"{result.dense_bytes:,}", f"{result.pruned_bytes:,}"),
    )
    lines = [f"| {name} | {dense} | {pruned} |" for name, dense, pruned in rows]
    return "\n".join(["| | dense | pruned |", "| --- | ---: | ---: |", *lines])


def _loading(result: PruneResult, composite: bool) -> str:
    model, reader, name = (
        ("AutoModelForImageTextToText", "AutoProcessor", "processor")
        if composite
        else ("AutoModelForCausalLM", "AutoTokenizer", "tokenizer")
    )
    return f"""## Loading

```python
from transformers import {", ".join(sorted((model, reader)))}

folder = "{Path(result.output).name}"
{name} = {reader}.from_pretrained(folder, trust_remote_code=True)
model = {model}.from_pretrained(folder, trust_remote_code=True)
```

The code that `trust_remote_code=True` runs lies in this folder. With the package installed,
`import intraslice` before these lines does instead of it."""


def _layers(result: PruneResult) -> str:
    sites = list_sites(result.layers)
    lines = [
        f"| {record.layer} | {record.shape.num_attention_heads} | {record.shape.num_key_value_heads} "
        f"| {record.shape.qk_head_dim} | {record.shape.v_head_dim} | {record.shape.intermediate_size} "
        + " ".join(f"| {record.errors[site]:.4f}" if site in record.errors else "|" for site in sites)
        + " |"
        for record in result.layers
    ]
    return "\n".join(
        [
            "## Layers",
            "",
            "Errors are relative and squared, of each site's output on the calibration tokens.",
            "",
            "| layer | heads | kv heads | qk dim | v dim | FFN | "
            + "".join(f"{site_title(site)} error | " for site in sites),
            "| ---: " * (6 + len(sites)) + "|",
            *lines,
        ]
    )


def _tuned(result: PruneResult) -> list[str]:
    if result.tuned is None:
        return []
    if not result.tuned.step:
        return [
            "Training all layers together afterwards has not lowered the divergence from the dense model on the "
            "sequences that were held out, so nothing of it was kept."
        ]
    return [
        "All layers were then trained together on the calibration tokens, towards the predictions of the dense model "
        f"({result.tuned.step} steps). On the sequences that were held out the KL divergence to them fell from "
        f"{result.tuned.before:.3f} to {result.tuned.after:.3f} nats per token. The errors in the table are those "
        "before it."
    ]


def _healed(result: PruneResult) -> list[str]:
    if result.healing is None:
        return []
    record = result.healing
    trained = {"full": "All weights but the embeddings", "lora": "Low-rank additions, merged into the weights,"}
    if record.options.get("train_embeddings"):
        trained["full"] = "All weights"
    return [
        "## Healing\n\n"
        f"{trained[record.options['weights']]} were then trained to give the predictions of "
        f"`{_hub_id(record.teacher) or Path(record.teacher).name}` on {record.best.tokens:,} tokens of "
        f"{Path(str(record.calibration['name'])).name} ({record.best_step} steps, learning rate "
        f"{record.learning_rate:g}). On held-out text the KL divergence to it fell from {record.kl_before:.3f} to "
        f"{record.best.kl:.3f} nats per token. The errors in the table above are those before it."
    ]


def _made(result: PruneResult) -> str:
    calibration = result.calibration
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return (
        "## How it was made\n\n"
        f"Calibration: {calibration['num_samples']} sequences of {calibration['seqlen']} tokens from "
        f"{Path(str(calibration['name'])).name}, seed {calibration['seed']}. "
        f"{result.seconds.get('total', 0.0):.0f} seconds on {result.device}, dtype {result.dtype}. "
        f"{versions}.\n\n"
        "`result.json` holds the recipe, a record of each layer and a fingerprint of the calibration tokens."
    )
