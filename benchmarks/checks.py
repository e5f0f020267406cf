"""What checksums and validation cost: their share of the processor time of one prune.

    OMP_NUM_THREADS=1 python benchmarks/checks.py --calibration text.txt --num-samples 8 --seqlen 128

All options are those of `intraslice prune`, and the model is smollm2-135m. The time of imports is not counted, which
makes the shares larger.
"""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intraslice.checkpoint import tensorfile
from intraslice.cli.app import main

MODEL = "smollm2-135m"
# Functions, or methods as "Class.method". `foreign` and `in_time` are left out: the work inside of them is needed.
CHECKED = {
    "checksums": {
        "intraslice.digests": ("bytes_digest", "file_digest", "range_digest", "seal", "is_sealed", "is_sealed_file"),
        "intraslice.checkpoint.folder": ("with_digests",),
    },
    "validation": {
        "intraslice.border": ("read_text", "read_json", "parse_json", "parse_yaml", "check_plain", "check_schema"),
        "intraslice.checkpoint.config_file": ("read_config_data", "check_layers"),
        "intraslice.checkpoint.folder": ("read_headers", "check_architecture"),
        "intraslice.checkpoint.gguf_header": ("read_header",),
        "intraslice.checkpoint.ownership": ("check_ours", "check_names", "check_intact", "read_list"),
        "intraslice.checkpoint.reader": ("check_shapes", "Checkpoint._check_against_config"),
        "intraslice.checkpoint.identity": ("check_identity",),
    },
}


class Meter:
    """Seconds of the processor by kind; a call within another one counts once, for the outer one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = False

    def measured(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, begin = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[kind] += time.process_time() - begin
                self._inside = False

        return call


def watch(meter: Meter) -> None:
    """Measure every call of the functions of `CHECKED`, wherever they were imported, and digests of what is written."""
    make = tensorfile.xxh3_128

    class Watched:
        def __init__(self, content: bytes) -> None:
            self._made = make(content)
            self.update = meter.measured("checksums", self._made.update)
            self.hexdigest = self._made.hexdigest

    tensorfile.xxh3_128 = Watched  # type: ignore[misc, assignment]
    for kind, modules in CHECKED.items():
        for module_name, names in modules.items():
            for name in names:
                *of_class, last = name.split(".")
                owner: Any = importlib.import_module(module_name)
                for part in of_class:
                    owner = getattr(owner, part)
                function = getattr(owner, last)
                measured = meter.measured(kind, function)
                setattr(owner, last, measured)
                for module in [value for key, value in sys.modules.items() if key.startswith("intraslice")]:
                    for attribute, value in list(vars(module).items()):
                        if value is function:
                            setattr(module, attribute, measured)


def run(options: list[str]) -> int:
    """Prune, and print the shares."""
    for module in ("api", "methods.blockwise.method", "checkpoint.writer", "checkpoint.gguf"):
        importlib.import_module(f"intraslice.{module}")
    meter = Meter()
    watch(meter)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        status = main(["prune", MODEL, "--sparsity", "0.3", "-o", str(Path(folder) / "out"), *options])
        total = time.process_time() - begin
    if status == 0:
        print(f"the prune: {total:.1f} s of the processor")
        for kind in CHECKED:
            print(f"{kind}: {meter.seconds[kind]:.3f} s, {meter.seconds[kind] / total:.2%}")
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
