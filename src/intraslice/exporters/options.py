"""What an export is asked for, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass

from intraslice.errors import RecipeError, nearest


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user may choose.

    Attributes:
        dtype: of the written weights: "auto" keeps the checkpoint's, or "float32", "bfloat16", "float16".
        pad_to: for padded: "dense" (the shapes of the dense model) or "max" (the largest of each size over the layers);
            None means dense where it is read.
        tokenizer_from: for gguf: a GGUF file of the same base model whose tokenizer keys are copied.
        verify: reload the result in its runtime, where that is installed, and compare the logits of a prompt.
        overwrite: replace an existing output.
    """

    dtype: str = "auto"
    pad_to: str | None = None
    tokenizer_from: str | None = None
    verify: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, known in (("dtype", ("auto", "float32", "bfloat16", "float16")), ("pad_to", ("dense", "max"))):
            value = getattr(self, name)
            if value not in known and (name, value) != ("pad_to", None):
                raise RecipeError(f"{name} must be one of {', '.join(known)}, got {value!r}.{nearest(value, known)}")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export has written.

    Attributes:
        to: name of the exporter.
        output: the folder or file that was written.
        notes: remarks for the user, one sentence each, for example what padding costs.
        max_logit_difference: largest difference to the logits of the checkpoint on a prompt; None when not verified.
        seconds: wall-clock time.
    """

    to: str
    output: str
    notes: tuple[str, ...] = ()
    max_logit_difference: float | None = None
    seconds: float = 0.0
