"""Every error that a user can cause: one sentence that says what was asked, what is possible, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IntraSliceError(Exception):
    """Base class; the command line prints the message and exits with status 2."""


class UnsupportedModelError(IntraSliceError):
    """The architecture, or a feature of it, is not one that can be pruned."""


class RecipeError(IntraSliceError, ValueError):
    """An option is unknown, out of range or contradicts another one."""


class BudgetError(IntraSliceError, ValueError):
    """The requested sparsity cannot be reached under the caps."""


class CalibrationError(IntraSliceError):
    """The calibration text is missing, too short or does not fit the model."""


class TaskError(IntraSliceError):
    """A zero-shot task is unknown, or its data is missing or malformed."""


class CheckpointError(IntraSliceError):
    """A checkpoint is missing, corrupt, unsafe or contradicts its config."""


class NumericalError(IntraSliceError):
    """NaN or infinite values, or a system that cannot be solved even with more damping."""


class ResumeMismatchError(IntraSliceError):
    """The interrupted run was started with another recipe, model or calibration."""


class OutputError(IntraSliceError):
    """The output cannot be written: it exists, or the disk is full."""


class ComparisonError(IntraSliceError):
    """A part of a comparison failed, or results of different protocols were to be mixed."""


class MissingExtraError(IntraSliceError):
    """An optional package is not installed; the message names the extra that brings it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " did you mean 'x'?" for the known name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def one_line(message: object) -> str:
    """Return a message, or that of an error, without line breaks: those of libraries run over many lines."""
    return " ".join(str(message).split())
