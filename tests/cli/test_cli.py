from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from intraslice.cli.app import app, main


@pytest.fixture
def run(capfd):
    """Return a function that runs the command line and returns (status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def refused(run):
    """Return a function that checks for status 2 and one line on standard error, and returns that line."""

    def call(*arguments: str) -> str:
        status, out, err = run(*arguments)
        assert status == 2
        assert out == ""
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0]

    return call


@pytest.mark.parametrize("command", [[], ["prune"], ["eval"], ["bench"], ["inspect"], ["compare"], ["report"]])
def test_help_imports_neither_torch_nor_transformers(command: list[str]):
    code = (
        "import sys\nfrom intraslice.cli.app import main\n"
        f"status = main({[*command, '--help']!r})\n"
        "heavy = [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]\n"
        "sys.exit(f'{status} {heavy}' if status or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str, run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(command, "--help")
    assert status == 0
    options = [option for option in COMMANDS[command].params if option.param_type_name == "option"]
    assert len(options) >= 2
    words = re.sub(r"[^\x21-\x7e]+", " ", out)
    for option in options:
        assert option.opts[0] in words
        assert option.help and " ".join(option.help.split()[:3]) in words, f"{option.opts[0]} is not explained"


def test_no_arguments_print_the_help(run):
    status, out, err = run()
    assert status == 0 and "Usage: intraslice" in out and not err


def test_help_of_prune_names_the_defaults(run):
    status, out, _ = run("prune", "--help")
    assert status == 0 and "128" in out and "2048" in out


def test_version(run):
    status, out, _ = run("--version")
    assert status == 0 and out.startswith("intraslice ")


def test_sparsity_is_refused_before_torch_is_imported():
    code = (
        "import sys\nfrom intraslice.cli.app import main\n"
        "status = main(['prune', 'm', '-o', 'o', '--sparsity', '0.95'])\n"
        "sys.exit(0 if status == 2 and 'torch' not in sys.modules else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.strip() == "error: sparsity must be in [0, 0.95), got 0.95"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("prune", "m", "--sparsty", "0.3"), "--sparsity"),
        (("prun", "m"), "'prune'"),
        (("prune", "m", "-o", "o", "--sparsity", "0.3", "--method", "adah"), "'ada-h'"),
        (("prune", "m", "-o", "o", "--sparsity", "0.3", "--set", "ffn.iterpca=1"), "'ffn.iter_pca'"),
        (("prune", "m", "-o", "o", "--sparsity", "0.3", "--num-samples", "many"), "--num-samples"),
        (("prune", "m", "-o", "o"), "sparsity"),
        (("prune", "-o", "o", "--sparsity", "0.3"), "model"),
        (("prune", "m", "-o", "o", "--sparsity", "0.3", "--dtype", "int4"), "bfloat16"),
        (("eval",), "model"),
    ],
)
def test_wrong_usage(refused, arguments: tuple[str, ...], expected: str):
    assert expected in refused(*arguments)


def test_inspect_dense(run, tiny_folder):
    folder = tiny_folder("llama")
    status, out, _ = run("inspect", folder)
    assert status == 0
    assert "dense" in out and "100.0 %" in out
    status, out, _ = run("inspect", folder, "--json")
    info = json.loads(out)
    assert [layer["shape"]["intermediate_size"] for layer in info["layers"]] == [64, 64, 64]
    # q, k, v, o: (4 + 2 + 2 + 4) x 8 channels, and three FFN matrices of 64, all times hidden size 32.
    assert info["layers"][0]["num_parameters"] == 32 * (12 * 8 + 3 * 64)


def test_inspect_reads_headers_and_no_weights(run, refused, make_folder, monkeypatch: pytest.MonkeyPatch):
    folder = make_folder("opt")
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("weights were read"))
        patch.setattr("torch.nn.Module.to_empty", lambda *_, **__: pytest.fail("memory was allocated"))
        assert run("inspect", folder)[0] == 0
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "truncated or corrupt" in refused("inspect", folder)


def test_inspect_refuses(refused, make_folder, tmp_path: Path):
    assert "no folder" in refused("inspect", tmp_path / "none")
    folder = make_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    line = refused("inspect", folder)
    assert "bloom" in line and "llama" in line


def test_eval(run, tiny_folder, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("Some words and some more words. " * 30)
    folder = tiny_folder("llama")
    status, out, _ = run("eval", folder, "--text", text, "--seqlen", "64", "--windows", "2")
    assert status == 0 and out.startswith("perplexity ")
    status, out, _ = run("eval", folder, "--text", text, "--seqlen", "64", "--windows", "2", "--json")
    result = json.loads(out)
    assert (result["num_windows"], result["num_tokens"]) == (2, 126)


def test_eval_refuses(refused, tiny_folder, make_folder, tmp_path: Path):
    folder = tiny_folder("llama")
    text = tmp_path / "text.txt"
    text.write_text("short")
    assert "5 tokens" in refused("eval", folder, "--text", text, "--seqlen", "64")
    assert "128 positions" in refused("eval", folder, "--seqlen", "4096")
    refused("eval", folder, "--text", "wikitxt2")
    assert "int3" in refused("eval", folder, "--text", text, "--dtype", "int3")
    broken = make_folder("llama")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refused("eval", broken, "--text", text)
    weights.unlink()
    assert "no weights" in refused("eval", broken, "--text", text)
    (broken / "pytorch_model.bin").write_bytes(b"x")
    assert "pickle" in refused("eval", broken, "--text", text)


def test_eval_refuses_weights_that_are_missing(refused, make_folder):
    from safetensors.torch import load_file, save_file

    folder = make_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused("eval", folder, "--seqlen", "64")


def test_bench(run, tiny_folder):
    arguments = ("--prompt-tokens", "8", "--decode-tokens", "2", "--repetitions", "1")
    folder = tiny_folder("llama")
    status, out, _ = run("bench", folder, "--against", folder, *arguments)
    assert status == 0
    assert "prefill" in out and "ratio" in out and "1.000" in out
    status, out, _ = run("bench", folder, "--json", *arguments)
    assert json.loads(out)["model"]["kv_cache_bytes_per_token"] == 384


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="sparsity"):
        main(["prune", "m", "--sparsity", "2", "--debug"])
