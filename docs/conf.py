"""Builds the site of the documentation: sphinx-build -W docs out/docs. Needs the extra [docs] and no network."""

from __future__ import annotations

from importlib.metadata import version as installed_version

import intraslice

project = "intraslice"
author = "the authors of intraslice"
# No year: a page must not differ because of the day on which it was built.
copyright = author
version = release = installed_version("intraslice")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = f"intraslice {version}"
html_show_sphinx = False
html_copy_source = False

# Anchors of headings as GitHub makes them, so that a link works in both places.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
# Defaults as they are written: the value of a constant of another module says less than its name.
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# Attributes as a list in the docstring of the class: documented twice they would be a warning.
napoleon_use_ivar = True
# The docstrings are written with single backticks for code.
default_role = "code"
# Types of private modules are shown by their name alone; they are described where the public API returns them.
python_use_unqualified_type_names = True

# What `import intraslice` offers; the list in api.rst cannot fall behind it.
_functions = sorted(name for name in intraslice.__all__ if not name.startswith("_"))
rst_prolog = f".. |exported| replace:: {', '.join(f':py:func:`~intraslice.api.{name}`' for name in _functions)}"
