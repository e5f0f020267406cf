"""`python -m intraslice` is the same as `intraslice`."""

from __future__ import annotations

import sys

from intraslice.cli.app import main

sys.exit(main())
