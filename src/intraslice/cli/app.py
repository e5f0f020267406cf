"""The `intraslice` command: gathers the commands, turns errors into one line and an exit status.

Nothing here or in the command modules imports torch at the top: `--help` and wrong options answer at once.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, cast

import typer

from intraslice.border import printable
from intraslice.cli import bench, compare, evaluate, export, heal, inspect, prune, report
from intraslice.cli.console import complain, interrupted, log_json, stop_signals
from intraslice.errors import IntraSliceError, RecipeError, one_line
from intraslice.files import check_home

ERROR_STATUS = 2
MAX_ARGUMENT = 1 << 16
"""Characters of an argument; names of files are much shorter."""
MAX_SENTENCE = 2000
"""Characters of a sentence; what is beyond them is cut."""

# typer brings its own copy of click or uses the installed one, depending on its version; both have this base.
_UsageError, _ClickException = cast("tuple[type[Exception], type[Exception]]", typer.BadParameter.__mro__[1:3])

app = typer.Typer(
    name="intraslice",
    help="Prune Hugging Face language models to smaller dense checkpoints that load everywhere.",
    epilog="Exit status: 0 done; 1 cells of a comparison failed; 2 a wrong input, which one line on standard error "
    "explains; 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP: what is finished is kept, and the last line says "
    "how to go on.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prune")(prune.prune)
app.command("heal")(heal.heal)
app.command("export")(export.export)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("inspect")(inspect.inspect)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"intraslice {version('intraslice')}")
        raise typer.Exit()


@app.callback()
def options(
    show_version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Prune Hugging Face language models to smaller dense checkpoints that load everywhere."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 when cells of a comparison failed; 2 after a wrong input (one line on standard error); 130 after Ctrl-C,
        143 after SIGTERM, 129 after SIGHUP.
    """
    # Nothing given is a question, not a mistake.
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    as_json = "--log-json" in given
    try:
        _check_readable(given)
        with stop_signals():
            status = parser()(given, prog_name="intraslice", standalone_mode=False, obj=given)
    except IntraSliceError as error:
        if "--debug" in given:
            raise
        return _fail(str(error), as_json)
    except _UsageError as error:
        return _fail(_usage_sentence(error), as_json)
    except _ClickException as error:
        return _fail(str(error), as_json)
    except (typer.Abort, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()
        # With a cause it comes from somewhere in the work (`stop_signals`), and nobody has said how far that was.
        advice = "nothing was written: repeat the command."
        if stopped.__cause__ is not None:
            advice = "repeat the command; what is finished is kept."
        return interrupted(stopped, advice, as_json=as_json)
    except (OSError, MemoryError) as error:
        if "--debug" in given:
            raise
        sentence = f"out of memory. {error}" if isinstance(error, MemoryError) else _system_sentence(error)
        return _fail(sentence, as_json)
    return status if isinstance(status, int) else 0


@cache
def parser() -> Any:
    """Return what parses a command line and runs the command; made once, because it takes longer than some commands."""
    return typer.main.get_command(app)


def _check_readable(arguments: Sequence[str]) -> None:
    """Refuse what no file name or record can be made of, before any work is done.

    Raises:
        RecipeError: an argument is not UTF-8, or starts in the home folder of somebody unknown.
    """
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise RecipeError(
                f"the argument {ascii(argument)[:200]} is not UTF-8 text; rename the file or folder."
            ) from None
        if len(argument) > MAX_ARGUMENT:
            raise RecipeError(
                f"an argument has {len(argument)} characters, and none needs more than {MAX_ARGUMENT}; it begins with "
                f"{argument[:40]!r}."
            )
        check_home(argument)


def _fail(sentence: str, as_json: bool) -> int:
    # Words of a stranger may be in it: as text that does not rewrite the screen, and not page after page of it.
    words = printable(one_line(sentence), MAX_SENTENCE)
    if as_json:
        log_json("error", message=words)
    else:
        complain(f"error: {words}")
    return ERROR_STATUS


def _system_sentence(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    advice = " free some space, or name an output on another disk." if error.errno == errno.ENOSPC else ""
    place = f"{error.filename!r}: " if error.filename else ""
    return f"{place}{error.strerror.lower()}.{advice}"


def _usage_sentence(error: BaseException) -> str:
    close = getattr(error, "possibilities", None) or []
    if close:
        return f"{getattr(error, 'message', error)}. Did you mean {' or '.join(close)}?"
    return error.format_message() if isinstance(error, typer.BadParameter) else str(error)
