"""All methods by name: one row each. No torch: the command line reads it before anything heavy is imported.

A method is an option set of a form. A form is a folder beside this file: a class of options, and the code that runs
with them (the `Method` protocol of base.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from intraslice.methods import presets
from intraslice.methods.choices import load


class MethodOptions(Protocol):
    """What the recipe asks of a form's options."""

    def read(self) -> set[str]:
        """Return the dotted names of the options that have an effect."""
        ...

    def contradiction(self, method: str, target: str) -> str | None:
        """Return a sentence when two options do not go together; None when all do."""
        ...

    def fitted(self, *, target: str, hidden_size: int, norms_first: bool, one_shape: bool) -> Any:
        """Return the options as a model of this kind can have them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Form:
    """What several methods may have in common: the code that they run.

    Attributes:
        options: class of the options, "package.module:Class".
        choices: function that returns the tables of the options that are choices; "" when there are none.
        build: class of the method, called with the options.
        any_target: whether layers keep shapes that runtimes other than transformers can be told.
        speed_target: function that finds the sparsity for a speed, "package.module:name"; "" when a speed cannot be the
            budget.
        size_limits: function that says how small a model can become, and what is added to its linear weights; "" when
            the method changes what stands outside of the layers, so that a size cannot be the budget.
        rotates_stream: whether the residual stream is rotated, which passes through an RMSNorm unchanged and through
            nothing else.
    """

    options: str
    build: str
    choices: str = ""
    any_target: bool = True
    speed_target: str = ""
    size_limits: str = ""
    rotates_stream: bool = False


BLOCKWISE = Form(
    options="intraslice.methods.blockwise.options:BlockwiseOptions",
    choices="intraslice.methods.blockwise.options:choices",
    build="intraslice.methods.blockwise.method:Blockwise",
    speed_target="intraslice.methods.blockwise.target_speed:choose_sparsity",
    size_limits="intraslice.methods.blockwise.target_size:size_limits",
)
SVD_LLM = Form(
    options="intraslice.methods.svd_llm.options:SvdLlmOptions",
    build="intraslice.methods.svd_llm.method:SvdLlm",
    size_limits="intraslice.methods.svd_llm.target_size:size_limits",
    any_target=False,
)
SLICEGPT = Form(
    options="intraslice.methods.slicegpt.options:SliceGptOptions",
    build="intraslice.methods.slicegpt.method:SliceGpt",
    any_target=False,
    rotates_stream=True,
)


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """One method.

    Attributes:
        form: the code that it runs.
        summary: for help and docs.
        preset: sections of options that differ from the form's defaults.
        efforts: sections on top of the preset, by what `--effort` names; {} when there is one way to run.
        paper: where it comes from.
    """

    form: Form
    summary: str
    preset: Mapping[str, Any] = field(default_factory=dict)
    efforts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paper: str = ""

    @property
    def options_class(self) -> type:
        """The class of its options."""
        return load(self.form.options)

    def choices(self) -> Mapping[str, Mapping[Any, Any]]:
        """Return the table of each option that is a choice."""
        return load(self.form.choices)() if self.form.choices else {}

    def build(self, options: Any) -> Any:
        """Return the method; imports torch."""
        return load(self.form.build)(options)


_INTRASLICE = "arXiv 2602.01975"
METHODS: dict[str, MethodEntry] = {
    "intraslice": MethodEntry(
        form=BLOCKWISE,
        preset=presets.INTRASLICE,
        efforts=presets.INTRASLICE_EFFORTS,
        summary="the default: block-intra PCA with repair",
        paper=_INTRASLICE,
    ),
    "iter-pca": MethodEntry(
        form=BLOCKWISE,
        preset=presets.ITER_PCA,
        summary="with iterative PCA in the FFNs that lose most",
        paper=_INTRASLICE,
    ),
    "ada-h": MethodEntry(
        form=BLOCKWISE,
        preset=presets.ADA_H,
        summary="ablation: the allocation without its PCA correction",
        paper=_INTRASLICE,
    ),
    "naive": MethodEntry(
        form=BLOCKWISE,
        preset=presets.NAIVE,
        summary="ablation: ada-h that removes whole heads instead of making them narrower",
        paper=_INTRASLICE,
    ),
    "wanda-sp": MethodEntry(
        form=BLOCKWISE, preset=presets.WANDA_SP, summary="structured Wanda", paper="arXiv 2306.11695"
    ),
    "flap": MethodEntry(form=BLOCKWISE, preset=presets.FLAP, summary="FLAP", paper="arXiv 2312.11983"),
    "slimllm": MethodEntry(
        form=BLOCKWISE, preset=presets.SLIMLLM, summary="SlimLLM without its training", paper="arXiv 2505.22689"
    ),
    "transact": MethodEntry(
        form=BLOCKWISE, preset=presets.TRANSACT, summary="TransAct without its training", paper="arXiv 2407.05690"
    ),
    "llm-pruner": MethodEntry(
        form=BLOCKWISE,
        preset=presets.LLM_PRUNER,
        summary="LLM-Pruner without its training",
        paper="arXiv 2305.11627",
    ),
    "llm-surgeon": MethodEntry(
        form=BLOCKWISE,
        preset=presets.LLM_SURGEON,
        summary="LLM-Surgeon: whole heads and channels, with five shots instead of 40",
        paper="arXiv 2312.17244",
    ),
    "disp-llm": MethodEntry(
        form=BLOCKWISE,
        preset=presets.DISP_LLM,
        summary="DISP-LLM as an allocation only: gates learn how much of each site stays, pruned as by intraslice",
        paper="arXiv 2410.11988",
    ),
    "tyr": MethodEntry(
        form=BLOCKWISE,
        preset=presets.TYR,
        summary="Týr-the-Pruner: a search over what each site loses, with a tenth of the published effort",
        paper="arXiv 2503.09657",
    ),
    "modegpt": MethodEntry(
        form=BLOCKWISE, preset=presets.MODEGPT, summary="MoDeGPT: modular decomposition", paper="arXiv 2408.09632"
    ),
    "sobp": MethodEntry(form=BLOCKWISE, preset=presets.SOBP, summary="structured optimal brain pruning"),
    "paper": MethodEntry(
        form=BLOCKWISE, preset=presets.PAPER, summary="IntraSlice's equations to the letter", paper=_INTRASLICE
    ),
    "svd-llm": MethodEntry(
        form=SVD_LLM, summary="SVD-LLM: each weight as two low-rank factors", paper="arXiv 2403.07378"
    ),
    "slicegpt": MethodEntry(
        form=SLICEGPT, summary="SliceGPT: the residual stream rotated and sliced", paper="arXiv 2401.15024"
    ),
}
