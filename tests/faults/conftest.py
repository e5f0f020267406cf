"""The commands that the campaign interrupts, on tiny models."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from intraslice.cli.app import parser
from intraslice.exporters.registry import EXPORTERS
from support.faults import Scenario, command, kill_when, run_forked
from support.pruned import FREE, save_pruned
from support.small_comparison import run_here, write_yaml
from support.tiny import make_tiny

# So that forked processes have them already.
_MODULES = (
    *("intraslice.api", "intraslice.healing.trainer", "intraslice.comparison.run", "intraslice.comparison.worker"),
    *("transformers.models.llama.modeling_llama", "transformers.integrations.sdpa_attention"),
    *(exporter.function.partition(":")[0] for name, exporter in EXPORTERS.items() if name in ("padded", "gguf")),
)
TEXT = "the quick brown fox jumps over the lazy dog and runs away from 3 bears; "


@pytest.fixture(scope="session")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scenario]:
    """Return a function name -> scenario; everything that they read is made once."""
    for module in _MODULES:
        importlib.import_module(module)
    parser()
    root = tmp_path_factory.mktemp("inputs")
    dense = make_tiny("llama", root / "dense", num_hidden_layers=3)
    text = root / "text.txt"
    text.write_text("".join(f"{number}. {TEXT}" for number in range(100)))
    pruned = save_pruned(root / "pruned", shapes=FREE[:2])
    calibrated = ["--calibration", text, "--num-samples", "8", "--seqlen", "16", "--set", "run.batch_tokens=64"]
    prune = ["prune", dense, "-o", "out", "--sparsity", "0.3", *calibrated]
    prune += ["--set", "ffn.ffn_multiple=1", "--set", "attention.head_multiple=2"]
    heal = ["--calibration", text, "--seqlen", "32", "--held-out", "4", "--evaluate-every", "4", "--lr", "3e-4"]
    spec = write_yaml(
        root / "spec.yaml",
        dense,
        methods=[{"label": "uniform", "method": "naive"}],
        sparsities=[0.3],
        calibration={"source": str(text), "num_samples": 4, "seqlen": 32},
        evaluation={"text": str(text), "seqlen": 64, "windows": 2},
    )

    def once(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
        """Return a function that fills a folder with a copy of what `make` has made the first time."""

        def fill(folder: Path) -> None:
            if not (root / name).exists():
                (root / name).mkdir()
                make(root / name)
            shutil.copytree(root / name, folder, dirs_exist_ok=True)

        return fill

    def done(*words: object) -> Callable[[Path], None]:
        """Return a function that runs a command in a folder."""

        def run(folder: Path) -> None:
            outcome = run_forked(command(*words), folder)
            assert outcome.status == 0, outcome.messages

        return run

    # An older output of the same name.
    old = once("old", done(*prune, "--sparsity", "0.1"))
    old_export = once("old-export", done("export", pruned, "--to", "padded", "-o", "out", "--no-verify"))

    def compare() -> int:
        with pytest.MonkeyPatch.context() as patch:
            run_here(patch)
            return command("compare", spec, "-o", "out")()

    def measured(folder: Path) -> dict[str, object]:
        """Seconds differ from run to run: names of all files, and the numbers of the table without them."""
        document = json.loads((folder / "out" / "comparison.json").read_text())
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        numbers = [cell["perplexity"] for cell in document["cells"]]
        return {"names": names, "perplexities": numbers}

    made = {
        "prune": Scenario("prune", command(*prune), command(*prune, "--resume")),
        "prune-on-disk": Scenario(
            "prune-on-disk",
            command(*prune, "--set", "run.hidden_states=disk", "--set", "run.boundary_bytes=1"),
            command(*prune, "--set", "run.hidden_states=disk", "--set", "run.boundary_bytes=1", "--resume"),
        ),
        "overwrite": Scenario(
            "overwrite", command(*prune, "--overwrite"), command(*prune, "--overwrite", "--resume"), old
        ),
        "export": Scenario(
            "export",
            command("export", pruned, "--to", "padded", "-o", "out", "--no-verify", "--overwrite"),
            command("export", pruned, "--to", "padded", "-o", "out", "--no-verify", "--overwrite"),
            old_export,
        ),
        "compare": Scenario("compare", compare, compare, results=measured),
    }

    def killed(folder: Path) -> None:
        """Leave a prune that was killed after its second layer."""
        layer = folder / "out.partial" / "layers" / "00001.safetensors"
        kill_when(command(*prune), folder, layer.exists)

    half = once("interrupted", killed)
    made["resume"] = Scenario("resume", command(*prune, "--resume"), command(*prune, "--resume"), half)

    def get(name: str) -> Scenario:
        if name == "heal" and name not in made:
            source = root / "to-heal"
            source.mkdir()
            # Pruned badly, so that a few steps help.
            done("prune", dense, "-o", "out", "--method", "naive", "--sparsity", "0.7", *calibrated)(source)
            given = ["heal", source / "out", "-o", "out", "--budget", "512", "--batch-size", "2", *heal]
            made["heal"] = Scenario("heal", command(*given), command(*given, "--resume"))
        if name == "gguf" and name not in made:
            pytest.importorskip("gguf")
            given = ["export", pruned, "--to", "gguf", "-o", "out.gguf", "--no-verify", "--overwrite"]
            made["gguf"] = Scenario("gguf", command(*given), command(*given))
        return made[name]

    return get
