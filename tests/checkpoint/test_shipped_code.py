"""What `inspect` says of the code in the folder of a model."""

from __future__ import annotations

import json
from pathlib import Path

from intraslice.checkpoint.shipped_code import code_in
from intraslice.cli.app import main
from support.prune import prune


def test_code_of_ours_and_of_others(tiny_folder, tmp_path: Path, capsys) -> None:
    dense, out = tiny_folder("llama"), tmp_path / "out"
    assert code_in(dense) == ("none", "")
    prune(dense, out)
    assert code_in(out)[0] == "shipped"
    assert main(["inspect", str(out)]) == 0
    assert "code in the folder  that of this release" in capsys.readouterr().out
    file = out / "modeling_intraslice.py"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"\n", b"\r\n"))
    assert code_in(out)[0] == "shipped"  # as some programs of versioning write it
    file.write_bytes(content + b"\nimport os\n")
    assert main(["inspect", str(out)]) == 0
    assert "NOT that of this release" in capsys.readouterr().out
    file.write_bytes(content)
    (out / "helper.py").write_text("")
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["code"] == "other"
