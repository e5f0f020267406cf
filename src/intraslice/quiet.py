"""Keeping libraries quiet while we use them: what matters in their warnings is raised as an error of ours."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress


@contextmanager
def quiet(*libraries: str, everything: bool = False) -> Iterator[None]:
    """Keep the logs of libraries and the progress bars of transformers off the screen; errors come through.

    Args:
        libraries: names of the loggers that report errors only, for example "transformers".
        everything: keep back the warnings of all loggers and Python's own as well, for libraries that talk about their
            own code under many names.
    """
    from transformers.utils import logging as transformers_logging

    # Makes transformers set up its logger now; later it would undo the level that is set here.
    transformers_logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with ExitStack() as stack:
            if everything:
                logging.disable(logging.WARNING)
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def no_words_of_compiled_code() -> Iterator[None]:
    """Keep off the screen what compiled code writes to standard error by itself.

    A tokenizer in Rust that panics says there where it did, before its exception says what it did.
    """
    kept = None
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
        kept = os.dup(2)
    if kept is None:
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
