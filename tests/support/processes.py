"""Python processes that load checkpoints: with the package, without it, and what they report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SOURCE = Path(__file__).parents[2] / "src"

LOAD_ALL = """
import json, sys
from pathlib import Path
import torch
{imports}
root = Path(sys.argv[1])
ids = torch.tensor(json.loads((root / "ids.json").read_text()))
from safetensors.torch import save_file
logits, modules = {{}}, {{}}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(folder, {arguments})
    base = AutoModel.from_pretrained(folder, {arguments})
    assert type(base).__name__ == type(model.get_decoder()).__name__.replace("Decoder", "Model"), type(base)
    with torch.no_grad():
        logits[folder.name] = model(ids).logits
    modules[folder.name] = type(model).__module__
save_file(logits, root / "logits.safetensors")
print(json.dumps(modules))
"""
BLOCK_PACKAGE = """
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "intraslice":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
"""
AUTO = "from transformers import AutoModel, AutoModelForCausalLM"


def run_python(code, root, tmp_path, *flags, **env):
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRANSFORMERS_CACHE")}
    clean |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, *flags, "-c", code, str(root)],
        env={**clean, "OMP_NUM_THREADS": "1", **env},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def check_logits(root, expected):
    actual = load_file(root / "logits.safetensors")
    assert actual.keys() == expected.keys()
    for case, logits in expected.items():
        torch.testing.assert_close(actual[case], logits, atol=1e-5, rtol=0)
