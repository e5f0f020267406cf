"""The exporters: an exporter is one function and one row. No torch here, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from intraslice.errors import RecipeError, nearest
from intraslice.exporters.options import ExportOptions


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """What is known of an exporter without importing it.

    Attributes:
        function: "module:function"; the function takes a `PrunedCheckpoint`, the output path, `ExportOptions` and
            `Progress`, and returns an `ExportReport`.
        summary: what it writes, in a few words.
        options: fields of `ExportOptions` that it reads; another one that is set is refused.
        extra: the extra of this package that it needs; None: it needs none.
        verified: what the result is run in to compare its logits with those of the checkpoint.
    """

    function: str
    summary: str
    options: tuple[str, ...] = ("dtype", "verify", "overwrite")
    extra: str | None = None
    verified: str


EXPORTERS: dict[str, Exporter] = {
    "stock": Exporter(
        function="intraslice.exporters.stock:export_stock",
        summary="the stock transformers class, for layers of one shape",
        verified="transformers",
    ),
    "padded": Exporter(
        function="intraslice.exporters.padded:export_padded",
        summary="the stock transformers class, layers of any shape zero-padded",
        options=("dtype", "pad_to", "verify", "overwrite"),
        verified="transformers",
    ),
    "gguf": Exporter(
        function="intraslice.exporters.gguf:export_gguf",
        summary="one file for llama.cpp",
        options=("dtype", "tokenizer_from", "verify", "overwrite"),
        extra="gguf",
        verified="llama-cpp-python, where installed",
    ),
    "onnx": Exporter(
        function="intraslice.exporters.onnx:export_onnx",
        summary="two graphs for onnxruntime",
        extra="onnx",
        verified="onnxruntime, where installed",
    ),
}
"""Name, as in `intraslice export --to NAME`, -> exporter."""


def find_exporter(name: str) -> Exporter:
    """Return the row of an exporter.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in EXPORTERS:
        raise RecipeError(f"unknown export {name!r}; exports are {', '.join(EXPORTERS)}.{nearest(name, EXPORTERS)}")
    return EXPORTERS[name]


def check_options(name: str, options: ExportOptions) -> None:
    """Refuse options without effect.

    Raises:
        RecipeError: an option that the exporter does not read is given.
    """
    known = find_exporter(name).options
    for field in fields(options):
        if field.name not in known and getattr(options, field.name) != field.default:
            raise RecipeError(
                f"export {name!r} does not read {field.name}; the options it reads are {', '.join(known)}."
            )


def readers(option: str) -> str:
    """Return the names of the exporters that read an option, for example "gguf" or "stock and padded"."""
    *others, last = (name for name, exporter in EXPORTERS.items() if option in exporter.options)
    return f"{', '.join(others)} and {last}" if others else last
