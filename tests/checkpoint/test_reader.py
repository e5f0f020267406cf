from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from intraslice.checkpoint.reader import open_folder
from intraslice.errors import CheckpointError, NumericalError, UnsupportedModelError
from intraslice.runtime.families_intraslice import FAMILIES as KNOWN
from support.family_cases import family_model
from support.tiny import FAMILIES, make_tiny

Folder = Callable[..., Path]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def one_sentence(caught: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300 + len(", ".join(KNOWN))
    for word in words:
        assert word in message


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_rest_are_the_whole_model(tiny_folder: Folder, family: str, tied: bool) -> None:
    folder = tiny_folder(family, tie_word_embeddings=tied)
    checkpoint = open_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.state_dict()
    if tied:
        expected.pop("lm_head.weight")

    found = checkpoint.load_rest()
    for index in range(checkpoint.num_layers):
        prefix = checkpoint.layer_prefix(index)
        found.update({prefix + name: tensor for name, tensor in checkpoint.load_layer(index).items()})

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoint.num_parameters() == model.num_parameters()
    assert checkpoint.tied is tied
    assert checkpoint.spec.name == family


def test_dtype_is_as_stored(tiny_folder: Folder) -> None:
    checkpoint = open_folder(tiny_folder("llama", dtype=torch.bfloat16))
    assert checkpoint.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in checkpoint.load_layer(0).values()} == {torch.bfloat16}


def test_skeleton_is_the_stock_model_without_memory(tiny_folder: Folder) -> None:
    skeleton = open_folder(tiny_folder("qwen2")).skeleton()
    assert type(skeleton).__name__ == "Qwen2ForCausalLM"
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_shards_hold_the_same_model(tiny_folder: Folder, tmp_path: Path) -> None:
    whole = tiny_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert not (tmp_path / "model.safetensors").exists()
    sharded = open_folder(tmp_path)
    before, now = open_folder(whole).identity(), sharded.identity()
    assert {**now, "files": None} == {**before, "files": None}  # saved without a tokenizer
    assert torch.equal(sharded.load_rest()["lm_head.weight"], model.lm_head.weight)


def test_fingerprint_sees_a_change_of_one_tensor(make_folder: Folder) -> None:
    folder = make_folder("llama")
    before = open_folder(folder).fingerprint()
    edit_weights(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(2))
    changed = open_folder(folder).fingerprint()
    edit_config(folder, rms_norm_eps=1e-3)
    assert len({before, changed, open_folder(folder).fingerprint()}) == 3


def test_names_saved_without_the_head_prefix(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("qwen2", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    layer = open_folder(tmp_path).load_layer(0)
    assert torch.equal(layer["mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


def test_old_rotary_buffers_are_ignored(make_folder: Folder) -> None:
    folder = make_folder("llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert "self_attn.rotary_emb.inv_freq" not in open_folder(folder).load_layer(0)


def test_a_stored_copy_of_a_tied_head_is_accepted_and_another_one_refused(make_folder: Folder) -> None:
    folder = make_folder("llama", tie_word_embeddings=True)

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(folder, untie)
    assert "lm_head.weight" not in open_folder(folder).load_rest()
    edit_weights(folder, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, "lm_head.weight", "tie_word_embeddings")


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    """Without the prefix of the class with the head, matrices as [in, out], and with masks that the class computes."""
    model = family_model("gpt2", torch.float32)
    model.save_pretrained(tmp_path)

    def published(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)

    edit_weights(tmp_path, published)
    layer = open_folder(tmp_path).load_layer(0)
    stock = model.transformer.h[0]
    assert torch.equal(layer["attn.c_attn.weight"], stock.attn.c_attn.weight.T)
    assert torch.equal(layer["mlp.c_proj.weight"], stock.mlp.c_proj.weight.T)
    assert torch.equal(layer["attn.c_attn.bias"], stock.attn.c_attn.bias) and "attn.bias" not in layer


def test_embeddings_of_another_name_are_compared_with_a_tied_head(tmp_path: Path) -> None:
    model = family_model("gpt2", torch.float32)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": model.transformer.wte.weight + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_folder(tmp_path)


def test_a_layer_costs_the_memory_of_a_layer(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    # 8 layers of 13 MB; in a process of its own, because peak memory never goes down again.
    folder = make_tiny("llama", tmp_path, hidden_size=512, intermediate_size=1536, num_hidden_layers=8)
    script = f"""
import resource
from pathlib import Path
from intraslice.checkpoint.reader import open_folder
checkpoint = open_folder(Path({str(folder)!r}))
checkpoint.load_layer(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for index in range(checkpoint.num_layers):
    layer = checkpoint.load_layer(index)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, sum(t.nbytes for t in layer.values()) / 2**20)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    grown, layer_size = map(float, out.split())
    # The layer before is still referenced while the next one is loaded; all eight would be seven more.
    assert layer_size > 12
    assert grown < 2.5 * layer_size


# Bad input: one sentence each.


def test_unsupported_architecture_names_the_supported_ones(make_folder: Folder) -> None:
    folder = make_folder("llama")
    edit_config(folder, model_type="mpt")
    with pytest.raises(UnsupportedModelError) as caught:
        open_folder(folder)
    one_sentence(caught, "mpt", *FAMILIES)


def test_code_of_the_model_is_never_run(make_folder: Folder) -> None:
    folder = make_folder("llama")
    (folder / "modeling_evil.py").write_text("raise SystemExit('this code was run')\n")
    auto_map = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit_config(folder, auto_map=auto_map, model_type="evil")
    with pytest.raises(UnsupportedModelError) as caught:
        open_folder(folder, trust_remote_code=True)
    one_sentence(caught, "evil", "code of its own")
    edit_config(folder, model_type="llama")
    assert type(open_folder(folder).config).__name__ == "LlamaConfig"


@pytest.mark.parametrize(
    "change", [{"model_type": "intraslice_llama"}, {"intraslice": {"format_version": 1}}], ids=["type", "key"]
)
def test_a_pruned_model_is_refused(make_folder: Folder, change: dict[str, object]) -> None:
    folder = make_folder("llama")
    edit_config(folder, **change)
    with pytest.raises(UnsupportedModelError) as caught:
        open_folder(folder)
    one_sentence(caught, "already pruned", "dense model")


def test_a_quantised_model_is_refused(make_folder: Folder) -> None:
    folder = make_folder("llama")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError) as caught:
        open_folder(folder)
    one_sentence(caught, "quantised (gptq)")


def test_integer_weights_are_refused(make_folder: Folder) -> None:
    folder = make_folder("llama")
    name = "model.layers.2.mlp.down_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(UnsupportedModelError) as caught:
        open_folder(folder)
    one_sentence(caught, name, "quantised")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_folder(tmp_path)
    one_sentence(caught, "no config.json")


@pytest.mark.parametrize("text", ["{", "[]", "\x00\xff"])
def test_broken_config(make_folder: Folder, text: str) -> None:
    folder = make_folder("llama")
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, "config.json")


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_attention_heads": 5}, {"hidden_act": "no_such_activation"}]
)
def test_invalid_config_value(make_folder: Folder, change: dict[str, object]) -> None:
    folder = make_folder("llama")
    edit_config(folder, **change)
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, "config.json", "not valid")


def test_no_weights(make_folder: Folder) -> None:
    folder = make_folder("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, "no weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickle_only(make_folder: Folder, name: str) -> None:
    folder = make_folder("llama")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, "pickle", name, "safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -5000])
def test_truncated_weights(make_folder: Folder, kept: int) -> None:
    path = make_folder("llama") / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(CheckpointError) as caught:
        open_folder(path.parent)
    one_sentence(caught, "model.safetensors", "truncated or corrupt")


@pytest.mark.parametrize("start", [b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
def test_corrupt_header(make_folder: Folder, start: bytes) -> None:
    path = make_folder("llama") / "model.safetensors"
    path.write_bytes(start + path.read_bytes()[len(start) :])
    with pytest.raises(CheckpointError) as caught:
        open_folder(path.parent)
    one_sentence(caught, "truncated or corrupt")


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_broken_index(make_folder: Folder, index: str) -> None:
    folder = make_folder("llama")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, "index.json", "is not JSON" if index == "{" else "corrupt")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "../secret.safetensors"])
def test_missing_shard(make_folder: Folder, name: str) -> None:
    folder = make_folder("llama")
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, name, "missing")


def test_missing_tensor(make_folder: Folder) -> None:
    folder = make_folder("llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, name, "lacks")


def test_unexpected_tensor(make_folder: Folder) -> None:
    folder = make_folder("llama")
    name = "model.layers.1.self_attn.k_proj.bias"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, name, "does not know")


def test_shape_contradicts_config(make_folder: Folder) -> None:
    folder = make_folder("llama")
    edit_config(folder, intermediate_size=65)
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    one_sentence(caught, "[64, 32]", "[65, 32]", "mlp.gate_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_names_the_layer(make_folder: Folder, value: float, dtype: torch.dtype) -> None:
    folder = make_folder("llama", dtype=dtype)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    edit_weights(folder, spoil)
    checkpoint = open_folder(folder)
    checkpoint.load_layer(0)
    with pytest.raises(NumericalError) as caught:
        checkpoint.load_layer(1)
    one_sentence(caught, "layer 1", "mlp.down_proj.weight")


def test_weights_that_vanish_after_opening(make_folder: Folder) -> None:
    folder = make_folder("llama")
    checkpoint = open_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_layer(0)
    one_sentence(caught, "cannot read")


def test_tokenizer_is_loaded_or_missed(make_folder: Folder) -> None:
    folder = make_folder("llama")
    assert open_folder(folder).load_tokenizer()("a")["input_ids"]
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder).load_tokenizer()
    one_sentence(caught, "tokenizer")
