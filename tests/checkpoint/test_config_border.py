"""config.json of a stranger: nothing is built that limits or the names of the tensors forbid, nothing is fetched."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from intraslice.checkpoint.source import open_checkpoint
from intraslice.errors import CheckpointError
from intraslice.loading import load_config, load_model
from intraslice.runtime import RUNTIME_FILES
from support.processes import BLOCK_PACKAGE, run_python
from support.pruned import FREE, save_pruned
from support.refusal import Refused
from support.tiny_composites import make_composite


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": "x"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": 2**63}, "hidden_size"),
        ({"vocab_size": 2**40}, "vocab_size = 1099511627776"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000"),
        ({"num_hidden_layers": 4000}, "its tensors are those of 3 layers"),
        ({"num_labels": 10**9}, "num_labels"),
        *(
            ({"dtype": dtype}, "no dtype of weights")
            for dtype in ("load", "int8", "complex64", ["float32"], "float8_e4m3fn")
        ),
        ({"hidden_act": "evil"}, "evil"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "nonsense"),
        ({"rope_parameters": ROPE}, "is not valid"),
        (
            {"rope_parameters": {**ROPE, "rope_type": "longrope", "short_factor": [1], "long_factor": "x"}},
            "is not valid",
        ),
        ({"pad_token_id": 10**6}, "is not valid"),
        ({"per_layer_config": {"0": {"foreign": 1}}}, "is not valid"),
        ({"per_layer_config": [1]}, "is not valid"),
        ({"num_attention_heads": 0}, "is not valid"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"model_type": "\ud800"}, "neither text"),
        ({"architectures": [[[[]]]] * 3, "hidden_size": [32]}, "is not valid"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_configs_that_no_model_can_have(
    command: str, fields: dict[str, Any], sentence: str, make_folder, tmp_path: Path, refused: Refused
) -> None:
    folder = make_folder("llama")
    change(folder, **fields)
    if command == "inspect" and "quantization_config" in fields:
        return  # a quantised model can be looked at
    options = ["-o", tmp_path / "out", "--sparsity", "0.3"] if command == "prune" else []
    assert sentence in refused(command, folder, *options)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        (7, "rope_parameters"),
        ({"rope_type": 5}, "is not valid"),
        ({"rope_type": "default", "rope_theta": [1]}, "is not valid"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": "x"}, "is not valid"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": -1}, "rotates -8 of the 8 channels"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e30}, "of the 8 channels"),
    ],
)
def test_rope_settings_of_a_text_tower(rope: Any, sentence: str, tmp_path: Path, refused: Refused) -> None:
    folder = make_composite("mistral3", tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder, text_config={**text, "rope_parameters": rope})
    (tmp_path / "text.txt").write_text("Some words, and some more words. " * 20)
    options = ["--sparsity", "0.3", "--num-samples", "2", "--seqlen", "16", "--calibration", tmp_path / "text.txt"]
    assert sentence in refused("prune", folder, "-o", tmp_path / "out", *options)
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_loads_and_cannot_run(make_folder, refused: Refused) -> None:
    """Rotary tables of half a head, to be multiplied with a whole one."""
    folder = make_folder("llama")
    change(folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5})
    (folder / "text.txt").write_text("Some words, and some more words. " * 20)
    assert "cannot be run" in refused("eval", folder, "--text", folder / "text.txt", "--seqlen", "16")


@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, '{"a":' * 5000 + "1" + "}" * 5000, "\udcff"])
def test_files_that_are_no_config(text: str, make_folder, refused: Refused) -> None:
    folder = make_folder("llama")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "config.json of" in refused("inspect", folder)


@pytest.mark.parametrize("kernel", ["kernels-community/flash-attn", "flash_attention_2", 7, {"": "x"}, "nonsense"])
def test_what_chooses_kernels_is_not_read(kernel: Any, make_folder) -> None:
    folder = make_folder("llama")
    fields = ("attn_implementation", "_attn_implementation", "experts_implementation")
    change(folder, **dict.fromkeys(fields, kernel), output_attentions=True, to_dict=5)
    model, _ = load_model(str(folder))
    assert model.config._attn_implementation == "sdpa"
    assert open_checkpoint(str(folder)).config._attn_implementation == "sdpa"


def test_a_config_that_asks_for_more_than_is_stored_allocates_nothing(tiny_folder, tmp_path: Path, monkeypatch) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    change(folder, vocab_size=10**9)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was allocated"))
    with pytest.raises(CheckpointError, match="asks for 64000027872 parameters, but its weight files hold"):
        load_model(str(folder))


def test_a_million_layers_are_answered_at_once(tiny_folder, tmp_path: Path, refused: Refused) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    change(folder, num_hidden_layers=10**6)
    start = time.monotonic()
    refused("inspect", folder)
    assert time.monotonic() - start < 5  # it took minutes


def test_an_adapter_beside_the_weights_is_not_applied(make_folder, refused: Refused) -> None:
    folder = make_folder("llama")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    for command in (
        ("inspect", folder),
        ("eval", folder),
        ("prune", folder, "-o", folder.parent / "out", "--sparsity", 0.3),
    ):
        assert "holds an adapter" in refused(*command)


LIES = {
    "heads_per_kv": ([], "x", [0], [-1], [2, 2, 2], [5], [2**62], [1.5], [True], None, {"a": 1}),
    "qk_head_dim": (0, -2, 7, 10, 2**62, "8", 8.0, None, True),
    "v_head_dim": (0, -1, 9, "8", None, []),
    "intermediate_size": (0, -1, 65, 2**62, "x", 1.0, None),
    "output_bias": (1, "x", None),
    "ranks": ("x", [1], [["x", 1]], [["mlp.up_proj", 0]], [["mlp.up_proj", 10**6]], [[1, 2]]),
    "dropped": ("x", ["ffn", "ffn"], ["both"], [[]], ["ffn"]),
    "unknown": (1,),
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pruned(tmp_path_factory.mktemp("pruned") / "model", shapes=FREE)


@pytest.mark.parametrize(("field", "lie"), [(field, lie) for field, lies in LIES.items() for lie in lies])
def test_shapes_that_lie_are_refused_with_their_layer(field: str, lie: Any, pruned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in pruned.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((pruned / "config.json").read_text())
    config["intraslice"]["layers"][1][field] = lie
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layer 1 of intraslice\.layers in config\.json") as caught:
        load_config(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "record", [5, [], {}, {"layers": []}, {"format_version": 1}, {"format_version": 1, "layers": "x"}]
)
@pytest.mark.parametrize("command", [("inspect",), ("export", "--to", "padded"), ("export", "--to", "gguf")])
def test_records_that_lie(
    record: Any, command: tuple[str, ...], pruned: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = shutil.copytree(pruned, tmp_path / "model")
    change(folder, intraslice=record)
    options = ["-o", tmp_path / "out"] if command[0] == "export" else []
    refused(command[0], folder, *command[1:], *options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


WITHOUT_PACKAGE = (
    BLOCK_PACKAGE
    + """
from transformers import AutoConfig
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
        print("read")
    except Exception as error:
        print(" ".join(str(error).split()))
"""
)


def test_the_code_that_travels_refuses_shapes_that_lie(pruned: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number, width in enumerate((8, -3, "x")):
        folder = root / f"{number}"
        folder.mkdir(parents=True)
        config = json.loads((pruned / "config.json").read_text())
        config["intraslice"]["layers"][2]["v_head_dim"] = width
        (folder / "config.json").write_text(json.dumps(config))
        for file in RUNTIME_FILES:
            shutil.copy(file, folder / file.name)
    read, *refused = run_python("import sys\nfrom pathlib import Path\n" + WITHOUT_PACKAGE, root, tmp_path).splitlines()
    assert read == "read"
    for width, sentence in zip((-3, "x"), refused, strict=True):
        assert f"layer 2 of intraslice.layers in config.json has v_head_dim = {width}" in sentence
