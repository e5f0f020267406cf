"""Text that every installation has: what ships with the interpreter, and with the packages that this one needs."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BUILT_IN = "builtin"

HELD_OUT_CHARS = (24_000, 104_000)
"""Characters of the built-in topics that "manual" leaves out, so that a model can be judged on them: the windows 4 to 9
of 2048 tokens, with tokenizers that make a token of 3 to 5 characters."""

HELD_OUT_PACKAGE = "asyncio"
"""Package of the standard library that "docstrings" and "code" leave out, for the same reason."""

# Shorter docstrings are fragments such as "Return x."
_MIN_DOCSTRING = 200
# Shorter paragraphs of a description are headings, badges and links.
_MIN_PARAGRAPH = 200
_SKIPPED_PACKAGES = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
# Modules that are tables rather than code.
_SKIPPED_MODULES = {"encodings", "sre_constants.py", "token.py", "keyword.py", "symbol.py"}


def built_in_documents(min_chars: int) -> Iterator[str]:
    """Yield the Python language reference; then, as far as needed, the docstrings of the standard library."""
    yield from _until(min_chars, _topics(), _docstrings(_paths()))


def manual_documents(min_chars: int) -> Iterator[str]:
    """Yield the same without what is held out."""
    yield from _until(min_chars, _manual_paragraphs(), _docstrings(_calibration_paths()))


def _manual_paragraphs() -> Iterator[str]:
    """Yield the paragraphs of the topics but those that are held out; sections that are in several topics count too."""
    first, last = HELD_OUT_CHARS
    kept, held, start = [], set(), 0
    for paragraph in "\n\n".join(_topics()).split("\n\n"):
        end = start + len(paragraph)
        if end > first and start < last:
            held.add(_bare(paragraph))
        else:
            kept.append(paragraph)
        start = end + 2
    for paragraph in kept:
        if _bare(paragraph) not in held:
            yield paragraph


def _bare(paragraph: str) -> str:
    # The same section is indented where it is part of another one.
    return " ".join(paragraph.split())


def docstring_documents(min_chars: int) -> Iterator[str]:
    """Yield docstrings of the standard library, then of the packages that this one needs."""
    yield from _until(min_chars, iter(()), chain(_docstrings(_calibration_paths()), _package_docstrings()))


def code_documents(min_chars: int) -> Iterator[str]:
    """Yield modules of the standard library; all of them are far more than is ever needed."""
    yield from _until(min_chars, iter(()), _modules())


def readme_documents(min_chars: int) -> Iterator[str]:
    """Yield the prose in the descriptions of the packages that this one needs, then docstrings of these packages."""
    yield from _until(min_chars, _descriptions(), _package_docstrings())


SHIPPED: dict[str, Callable[[int], Iterator[str]]] = {
    BUILT_IN: built_in_documents,
    "manual": manual_documents,
    "docstrings": docstring_documents,
    "code": code_documents,
    "readmes": readme_documents,
}
"""The documents of a source, by its name; called with how many characters are needed."""


def _until(min_chars: int, whole: Iterator[str], more: Iterator[str]) -> Iterator[str]:
    """Yield all of the first documents, and of the others as many as are needed."""
    size = 0
    for document in whole:
        size += len(document)
        yield document
    if size >= min_chars:
        return
    for document in more:
        size += len(document)
        yield document
        if size >= min_chars:
            return


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _paths() -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"), key=lambda path: (len(path.parts), str(path))):
        if not _SKIPPED_PACKAGES.intersection(path.relative_to(library).parts):
            yield path


def _calibration_paths() -> list[Path]:
    """Return the modules to calibrate on, mixed, so that the first ones are like all of them."""
    kept = [path for path in _paths() if HELD_OUT_PACKAGE not in path.parts]
    return sorted(kept, key=lambda path: hashlib.sha256("/".join(path.parts[-2:]).encode()).hexdigest())


def _modules() -> Iterator[str]:
    for path in _calibration_paths():
        if _SKIPPED_MODULES.intersection(path.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def held_out_code() -> str:
    """Return the modules that "code" and "docstrings" leave out, as one text to judge a model on."""
    return "\n\n".join(path.read_text(encoding="utf-8") for path in _paths() if HELD_OUT_PACKAGE in path.parts)


def _docstrings(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        yield from _docstrings_of(path)


def _package_docstrings() -> Iterator[str]:
    for package in _needed():
        for file in sorted(package.files or [], key=lambda file: (len(file.parts), str(file))):
            if file.suffix == ".py" and not _SKIPPED_PACKAGES.intersection(file.parts):
                path = Path(str(file.locate()))
                if path.is_file():
                    yield from _docstrings_of(path)


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # The library ships templates and broken examples that are not meant to be parsed.
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            document = ast.get_docstring(node)
            if document and len(document) >= _MIN_DOCSTRING:
                yield document


def _needed() -> list[Distribution]:
    """Return the distributions that this package needs, and what those need, by name.

    Those of extras are not among them, because they are not installed everywhere.
    """
    found: dict[str, Distribution] = {}
    names = [__name__.partition(".")[0]]
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        needed = [Requirement(line) for line in found[name].requires or []]
        names += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    # Its own description changes with each release, and is what the demo judges a model on.
    return [found[name] for name in sorted(found) if name != __name__.partition(".")[0]]


def _descriptions() -> Iterator[str]:
    for package in _needed():
        _, _, description = (package.read_text("METADATA") or "").partition("\n\n")
        for paragraph in re.split(r"\n\s*\n", description):
            # Tables, badges and lists of links are no prose.
            if len(paragraph) >= _MIN_PARAGRAPH and paragraph.count("](") < 4 and paragraph.count("|") < 4:
                yield paragraph
