"""The commands that the campaign interrupts, on tiny models."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

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
    root = tmp_path_factory.mktemp("inputs")
    dense = make_tiny("llama", root / "dense", num_hidden_layers=4)
    text = root / "text.txt"
    text.write_text("".join(f"{number}. {TEXT}" for number in range(100)))
    pruned = save_pruned(root / "pruned", shapes=FREE[:2])
    sizes = ["--calibration", text, "--num-samples", "8", "--seqlen", "32", "--set", "ffn.ffn_multiple=1"]
    sizes += ["--set", "attention.head_multiple=2", "--set", "run.batch_tokens=64"]
    prune = ["prune", dense, "-o", "out", "--sparsity", "0.3", *sizes]
    heal = ["--calibration", text, "--seqlen", "32", "--held-out", "4", "--evaluate-every", "2", "--lr", "1e-3"]
    spec = write_yaml(root / "spec.yaml", dense, methods=[{"label": "uniform", "method": "naive"}], sparsities=[0.3])

    def old(folder: Path) -> None:
        """Leave an older output of the same name."""
        done = run_forked(command(*prune, "--sparsity", "0.1"), folder)
        assert done.status == 0, done.messages

    def old_export(folder: Path) -> None:
        done = run_forked(command("export", pruned, "--to", "padded", "-o", "out", "--no-verify"), folder)
        assert done.status == 0, done.messages

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
    interrupted = root / "interrupted"

    def half(folder: Path) -> None:
        """Leave a prune that was killed after its second layer."""
        if not interrupted.exists():
            interrupted.mkdir()
            layer = interrupted / "out.partial" / "layers" / "00001.safetensors"
            kill_when(command(*prune), interrupted, layer.exists)
        shutil.copytree(interrupted, folder, dirs_exist_ok=True)

    made["resume"] = Scenario("resume", command(*prune, "--resume"), command(*prune, "--resume"), half)

    def get(name: str) -> Scenario:
        if name == "heal" and name not in made:
            source = root / "to-heal"
            source.mkdir()
            old(source)
            given = ["heal", source / "out", "-o", "out", "--budget", "512", "--batch-size", "2", *heal]
            made["heal"] = Scenario("heal", command(*given), command(*given, "--resume"))
        if name == "gguf" and name not in made:
            pytest.importorskip("gguf")
            given = ["export", pruned, "--to", "gguf", "-o", "out.gguf", "--no-verify", "--overwrite"]
            made["gguf"] = Scenario("gguf", command(*given), command(*given))
        return made[name]

    return get
