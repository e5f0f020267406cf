"""GGUF files, run by a small interpreter of llama.cpp's rules that shares no code with the exporter."""

from __future__ import annotations

import builtins
import errno
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from intraslice.checkpoint.pruned import open_pruned
from intraslice.errors import CheckpointError, MissingExtraError, OutputError, UnsupportedModelError
from intraslice.exporters import gguf as exporter
from intraslice.exporters.gguf import export_gguf
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.progress import SilentProgress
from intraslice.runtime.families_intraslice import FAMILIES, LayerShape
from support.family_cases import KNOWN_FAMILIES
from support.llama_cpp import Interpreter, read
from support.pruned import FREE, prune_family, save_pruned
from support.tiny import VOCAB_SIZE, tiny_tokenizer

gguf = pytest.importorskip("gguf")

D, HEADS, KV_HEADS, WIDTH = 32, 4, 2, 8
TOKENS = torch.randint(VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(3))


def shape(heads_per_kv: tuple[int, ...], qk: int, v: int, ffn: int) -> LayerShape:
    return LayerShape(heads_per_kv=heads_per_kv, qk_head_dim=qk, v_head_dim=v, intermediate_size=ffn)


SHARED = [shape((2, 2), 4, 4, 40), shape((1,), 4, 4, 64), shape((2,), 4, 4, 9)]
RAGGED = [shape((2, 1), 6, 5, 40), shape((1, 2), 4, 7, 9), shape((1,), 8, 4, 64)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
PARTIAL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}


def export(source: Path, output: Path, **options: Any) -> ExportReport:
    return export_gguf(open_pruned(str(source)), output, ExportOptions(**options), SilentProgress())


def reference(source: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(tokens).logits[0]


def one_sentence(caught: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


def alone(path: Path) -> bool:
    """Return whether nothing unfinished lies beside `path`."""
    return not [other for other in path.parent.iterdir() if ".tmp" in other.name]


CASES: dict[str, tuple[str, list[LayerShape], dict[str, Any]]] = {
    "all pairs": ("llama", FREE, {}),
    "tied": ("llama", FREE, {"tie_word_embeddings": True}),
    "all biases": ("llama", FREE, {"attention_bias": True, "mlp_bias": True}),
    "output biases of one layer": ("llama", [replace(FREE[0], output_bias=True), *FREE[1:]], {}),
    "output biases, padded": ("qwen2", [replace(RAGGED[0], output_bias=True), RAGGED[2]], {}),
    "shared pairs": ("llama", SHARED, {"pairs": [0, 3]}),
    "shared pairs out of order": ("llama", SHARED, {"pairs": [3, 1]}),
    "shared pairs, ragged": ("llama", [shape((2, 1), 4, 3, 40), SHARED[1]], {"pairs": [1, 3]}),
    "shared pairs, wider values": ("llama", [shape((2, 1), 4, 7, 40), SHARED[1]], {"pairs": [1, 3]}),
    "own pairs, ragged": ("llama", RAGGED, {}),
    "no attention": ("llama", [FREE[0], FREE[1].without("attention"), FREE[2]], {}),
    "no attention in the first layer": ("llama", [FREE[0].without("attention"), FREE[1]], {}),
    "FFN dropped": ("llama", [FREE[0], FREE[1].without("ffn"), FREE[2]], {}),
    "nothing left": ("llama", [FREE[0], FREE[1].without("ffn").without("attention"), FREE[2]], {}),
    "nothing left at both ends": (
        "llama",
        [FREE[0].without("ffn").without("attention"), FREE[1], FREE[2].without("attention").without("ffn")],
        {"attention_bias": True, "mlp_bias": True},
    ),
    "dropped, ragged and biased": (
        "qwen2",
        [RAGGED[0].without("attention"), replace(RAGGED[0], output_bias=True), RAGGED[2].without("ffn")],
        {},
    ),
    "dropped, shared pairs": ("llama", [SHARED[0], SHARED[1].without("attention"), SHARED[2]], {"pairs": [0, 3]}),
    "llama3": ("llama", FREE, {"rope_parameters": LLAMA3}),
    "llama3, shared pairs": ("llama", SHARED, {"rope_parameters": LLAMA3, "pairs": [1, 3]}),
    "llama3, own pairs": ("llama", RAGGED, {"rope_parameters": LLAMA3}),
    "linear": ("llama", RAGGED, {"rope_parameters": LINEAR}),
    "yarn": ("llama", RAGGED, {"rope_parameters": YARN}),
    "yarn, shared pairs": ("llama", SHARED, {"rope_parameters": YARN, "pairs": [0, 1]}),
    "mistral": ("mistral", RAGGED, {}),
    "mistral, shared pairs": ("mistral", SHARED, {"pairs": [0, 3]}),
    "qwen2": ("qwen2", FREE, {}),
    "qwen2, shared pairs": ("qwen2", SHARED, {"pairs": [0, 3]}),
    "qwen2, own pairs": ("qwen2", RAGGED, {}),
    "phi3": ("phi3", FREE, {}),
    "phi3, own pairs": ("phi3", RAGGED, {}),
    "phi3, partly rotated": ("phi3", FREE, {"rope_parameters": PARTIAL}),
    "phi3, partly rotated, shared pairs": ("phi3", SHARED, {"rope_parameters": PARTIAL, "pairs": [0, 3]}),
    "phi3, partly rotated, own pairs": ("phi3", RAGGED, {"rope_parameters": PARTIAL}),
}


IN_LLAMA_CPP = [name for name in KNOWN_FAMILIES if not FAMILIES[name].llama_cpp_lacks or FAMILIES[name].llama_cpp]


@pytest.mark.parametrize("family", IN_LLAMA_CPP)
def test_a_family_in_llama_cpp(tmp_path: Path, family: str) -> None:
    spec = FAMILIES[family]
    config: dict[str, Any] = {"attention_bias": False}
    if windows := bool(spec.llama_cpp and spec.llama_cpp.windows):
        config["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if "llama.cpp" in spec.without_targets:
        # Checkpoints of any shapes are zero-padded.
        prune_family(family, tmp_path, more={"attention.qk_width": "dense"}, **config)
    elif spec.llama_cpp_lacks:
        # One shape for all layers, so steps are coarse.
        more = {"attention.context_multiple": 2}
        prune_family(family, tmp_path, "llama.cpp", sparsity=0.25, more=more, **config)
    else:
        prune_family(family, tmp_path, "llama.cpp")
    export(tmp_path / "pruned", tmp_path / "model.gguf", verify=False)
    # As short as the windows of the cases where llama.cpp has none: there the file limits the text.
    text = TOKENS[0] if windows else TOKENS[0][:5]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()(text[None]).logits[0]
    # float32 on both sides; the angles are rounded differently.
    torch.testing.assert_close(read(tmp_path / "model.gguf").logits(text.tolist()), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_same_logits_as_the_checkpoint(tmp_path: Path, case: str) -> None:
    family, shapes, options = CASES[case]
    source = save_pruned(tmp_path / "pruned", family, shapes, **options)
    output = tmp_path / "model.gguf"
    export(source, output, verify=False)
    file = Interpreter(output)
    expected = reference(source)
    # float32 on both sides; the angles are rounded differently.
    torch.testing.assert_close(file.logits(TOKENS[0].tolist()), expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 1
    shared = options.get("pairs") and "wider values" not in case
    assert file.width == (4 if shared else WIDTH)
    assert ("rope_freqs.weight" in file.tensors) == bool(shared or "rope_parameters" in options)


def test_sizes_and_metadata(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned", shapes=FREE, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    output = tmp_path / "deeper" / "model.gguf"
    report = export(source, output, verify=False)
    file = Interpreter(output)
    assert (report.to, report.output, report.max_logit_difference) == ("gguf", str(output), None)
    assert report.seconds > 0
    assert file.fields["general.name"] == "pruned"
    assert file.get("attention.head_count") == [4, 2, 3]
    assert file.get("attention.head_count_kv") == [2, 2, 1]
    assert file.get("feed_forward_length") == [40, 64, 9]
    assert file.get("context_length") == 128
    assert file.get("rope.freq_base") == 77.0
    assert file.get("vocab_size") == VOCAB_SIZE
    assert file.fields["general.file_type"] == 0
    field = gguf.GGUFReader(output).fields["deci.attention.head_count"]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert alone(output)


def test_free_shapes_are_not_padded_and_ragged_ones_say_what_it_costs(tmp_path: Path) -> None:
    free = export(save_pruned(tmp_path / "free"), tmp_path / "free.gguf", verify=False)
    assert not any("zero-padded" in note for note in free.notes)
    ragged = export(save_pruned(tmp_path / "ragged", shapes=RAGGED), tmp_path / "ragged.gguf", verify=False)
    (note,) = [note for note in ragged.notes if "zero-padded" in note]
    # Linear weights over D, counted by hand.
    before = sum(
        (s.num_attention_heads + s.num_key_value_heads) * (s.qk_head_dim + s.v_head_dim) + 3 * s.intermediate_size
        for s in RAGGED
    )
    after = sum(heads * 16 + 3 * ffn for heads, ffn in ((6, 40), (6, 9), (2, 64)))
    assert f"{after / before - 1:.1%}" in note
    assert "3 of 3 layers" in note and "--target llama.cpp" in note


def test_rows_that_cannot_be_quantised_are_named(tmp_path: Path) -> None:
    shapes = [shape((2, 2), 8, 8, 64), shape((2, 2), 8, 8, 63)]
    report = export(save_pruned(tmp_path / "pruned", shapes=shapes), tmp_path / "model.gguf", verify=False)
    (note,) = [note for note in report.notes if "quantisation" in note]
    assert note.startswith("1 of 2 layers")


@pytest.mark.parametrize(
    ("stored", "asked", "kind", "tolerance"),
    [
        (torch.float32, "float16", "F16", 0.02),
        (torch.float32, "bfloat16", "BF16", 0.15),
        (torch.bfloat16, "auto", "BF16", 0.05),
        (torch.float16, "auto", "F16", 0.02),
        (torch.bfloat16, "float32", "F32", 1e-4),
    ],
)
def test_dtypes(tmp_path: Path, stored: torch.dtype, asked: str, kind: str, tolerance: float) -> None:
    source = save_pruned(tmp_path / "pruned", "qwen2", SHARED, pairs=[0, 3], dtype=stored)
    output = tmp_path / "model.gguf"
    export(source, output, dtype=asked, verify=False)
    file = Interpreter(output)
    difference = (file.logits(TOKENS[0].tolist()) - reference(source)).abs().max()
    assert difference < tolerance
    assert {file.kinds[name] for name, tensor in file.tensors.items() if tensor.dim() == 2} == {kind}
    assert {file.kinds[name] for name, tensor in file.tensors.items() if tensor.dim() == 1} == {"F32"}
    assert file.fields["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[kind]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(source)
    with pytest.raises(CheckpointError) as caught:
        export(source, tmp_path / "model.gguf", dtype="float16", verify=False)
    one_sentence(caught, "blk.1.ffn_up.weight", "float16", "bfloat16")
    assert not (tmp_path / "model.gguf").exists() and alone(tmp_path / "model.gguf")


def test_a_window_limits_the_context(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned", "mistral", sliding_window=24)
    report = export(source, tmp_path / "model.gguf", verify=False)
    file = Interpreter(tmp_path / "model.gguf")
    assert file.get("context_length") == 24
    assert any("24 instead of 128" in note for note in report.notes)
    inside = TOKENS[:, :24]
    torch.testing.assert_close(file.logits(inside[0].tolist()), reference(source, inside), atol=1e-4, rtol=0)
    # One token more, and the window would matter.
    assert (file.logits(TOKENS[0, :25].tolist()) - reference(source, TOKENS[:, :25])).abs().max() > 1e-3


def test_a_window_as_wide_as_the_context_is_none(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned", "mistral", sliding_window=128)
    report = export(source, tmp_path / "model.gguf", verify=False)
    assert Interpreter(tmp_path / "model.gguf").get("context_length") == 128
    assert not any("window" in note for note in report.notes)


# Refusals.


def test_opt_is_refused(tmp_path: Path) -> None:
    shapes = [LayerShape(heads_per_kv=(1,) * 4, qk_head_dim=8, v_head_dim=8, intermediate_size=40)]
    source = save_pruned(tmp_path / "pruned", "opt", shapes)
    with pytest.raises(UnsupportedModelError) as caught:
        export(source, tmp_path / "model.gguf")
    one_sentence(caught, "opt", "RoPE", "transformers")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(tmp_path: Path, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 500.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    source = save_pruned(tmp_path / "pruned", rope_parameters=rope)
    with pytest.raises(UnsupportedModelError) as caught:
        export(source, tmp_path / "model.gguf")
    one_sentence(caught, kind, "length")


def test_other_activations_are_refused(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned", hidden_act="gelu")
    with pytest.raises(UnsupportedModelError) as caught:
        export(source, tmp_path / "model.gguf")
    one_sentence(caught, "gelu", "silu")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_pruned(tmp_path / "pruned")
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError) as caught:
        export(source, tmp_path / "model.gguf")
    one_sentence(caught, "pip install 'intraslice[gguf]'")


# The output.


def test_existing_output(tmp_path: Path) -> None:
    source, output = save_pruned(tmp_path / "pruned"), tmp_path / "model.gguf"
    export(source, output, verify=False)
    before = output.read_bytes()
    with pytest.raises(OutputError) as caught:
        export(source, output, verify=False)
    one_sentence(caught, "already exists", "--overwrite")
    output.write_bytes(before[:100])
    export(source, output, verify=False, overwrite=True)
    assert output.read_bytes() == before


def test_what_is_never_replaced(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned")
    text = tmp_path / "notes.txt"
    text.write_text("keep me")
    with pytest.raises(OutputError) as caught:
        export(source, text, overwrite=True)
    one_sentence(caught, "not a GGUF file")
    with pytest.raises(OutputError) as caught:
        export(source, tmp_path, overwrite=True)
    one_sentence(caught, "folder", ".gguf")
    base = tmp_path / "base.gguf"
    export(source, base, verify=False)
    with pytest.raises(OutputError) as caught:
        export(source, base, overwrite=True, tokenizer_from=str(base))
    one_sentence(caught, "tokenizer")
    assert text.read_text() == "keep me"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = save_pruned(tmp_path / "pruned"), tmp_path / "model.gguf"
    real = gguf.GGUFWriter.write_tensor_data
    calls = 0

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        real(self, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(source, output)
    assert calls == 9 and not output.exists() and alone(output)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = save_pruned(tmp_path / "pruned"), tmp_path / "model.gguf"
    export(source, output, verify=False)
    before = output.read_bytes()

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError) as caught:
        export(source, output, overwrite=True)
    one_sentence(caught, "disk is full")
    assert output.read_bytes() == before and alone(output)


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    source, output = save_pruned(tmp_path / "pruned"), tmp_path / "model.gguf"
    config = json.loads((source / "config.json").read_text())
    config["intraslice"]["layers"][2]["intermediate_size"] += 1
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        export(source, output)
    assert not output.exists() and alone(output)


# Verification, with the interpreter in place of llama.cpp.


def fake_llama(monkeypatch: pytest.MonkeyPatch, off_by: float = 0.0) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    class Llama:
        def __init__(self, model_path: str, **options: Any) -> None:
            asked.append(options)
            self.file = Interpreter(Path(model_path))

        def eval(self, tokens: list[int]) -> None:
            logits = self.file.logits(tokens) + off_by
            self.scores = np.concatenate([logits.numpy(), np.zeros((8, VOCAB_SIZE), np.float32)])

        def close(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    return asked


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
def test_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    asked = fake_llama(monkeypatch)
    report = export(save_pruned(tmp_path / "pruned", shapes=RAGGED), tmp_path / "model.gguf", dtype=dtype)
    assert report.max_logit_difference is not None
    assert 0 < report.max_logit_difference < {"auto": 1e-4, "float16": 0.05, "bfloat16": 0.3}[dtype]
    assert (asked[0]["type_k"], asked[0]["type_v"], asked[0]["logits_all"]) == (0, 0, True)
    assert not any("verified" in note for note in report.notes)


@pytest.mark.parametrize("off_by", [0.1, float("nan")])
def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_by: float
) -> None:
    fake_llama(monkeypatch, off_by)
    output = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError) as caught:
        export(save_pruned(tmp_path / "pruned"), output)
    one_sentence(caught, "other logits", "not kept")
    assert not output.exists() and alone(output)


def test_a_file_that_llama_cpp_does_not_load_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ValueError("Failed to load model from file")

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=refuse))
    output = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError) as caught:
        export(save_pruned(tmp_path / "pruned"), output)
    one_sentence(caught, "Failed to load", "not kept")
    assert not output.exists() and alone(output)


def test_not_verified_without_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    report = export(save_pruned(tmp_path / "pruned"), tmp_path / "model.gguf")
    assert report.max_logit_difference is None
    assert any("llama-cpp-python is not installed" in note for note in report.notes)


# The tokenizer.


def tokenizer_keys(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: (field.types, field.contents()) for key, field in fields.items() if key.startswith("tokenizer.")}


def test_tokenizer_copied_from_a_file(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned")
    base, output = tmp_path / "base.gguf", tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(base, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{index}".encode() for index in range(VOCAB_SIZE - 1)] + [b"\xc4"])
    writer.add_token_types([1] * VOCAB_SIZE)
    writer.add_token_merges(["t h", "a b"])
    writer.add_token_scores([0.5] * VOCAB_SIZE)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    (source / "tokenizer.json").unlink()
    report = export(source, output, verify=False, tokenizer_from=str(base))
    assert any("copied from 'base.gguf'" in note for note in report.notes)

    def raw(path: Path) -> dict[str, Any]:
        fields = gguf.GGUFReader(path).fields
        wanted = {key: field for key, field in fields.items() if key.startswith("tokenizer.")}
        return {
            key: (field.types, [field.parts[index].tobytes() for index in field.data]) for key, field in wanted.items()
        }

    assert raw(output) == raw(base) and len(raw(base)) == 9


def test_tokenizer_of_the_file_that_was_pruned(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned")
    base = tmp_path / "base.gguf"
    export(source, base, verify=False)
    (source / "tokenizer.json").unlink()
    (source / "result.json").write_text(json.dumps({"model": str(base)}))
    report = export(source, tmp_path / "model.gguf", verify=False)
    assert any("copied from 'base.gguf'" in note for note in report.notes)
    assert tokenizer_keys(tmp_path / "model.gguf") == tokenizer_keys(base)


def test_a_file_that_is_gone_leaves_tokenizer_json(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned")
    (source / "result.json").write_text(json.dumps({"model": str(tmp_path / "gone.gguf")}))
    report = export(source, tmp_path / "model.gguf", verify=False)
    assert any("tokenizer.json" in note for note in report.notes)


def test_tokenizer_files_that_do_not_fit(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned")
    small = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(small, "llama")
    writer.add_token_list([b"a", b"b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    (tmp_path / "broken.gguf").write_bytes(small.read_bytes()[:60])
    for name, words in {
        "small.gguf": ("2 tokens", str(VOCAB_SIZE), "--tokenizer-from"),
        "broken.gguf": ("truncated or corrupt",),
        "missing.gguf": ("no file",),
    }.items():
        with pytest.raises(CheckpointError) as caught:
            export(source, tmp_path / "model.gguf", tokenizer_from=str(tmp_path / name))
        one_sentence(caught, name, *words)
        assert not (tmp_path / "model.gguf").exists()


def test_tokenizer_built_from_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["word"])
    tokenizer.chat_template = "{{ messages }}"
    source = save_pruned(tmp_path / "pruned", tokenizer=tokenizer)
    export(source, tmp_path / "model.gguf", verify=False)
    fields = Interpreter(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:260] == tokenizer.convert_ids_to_tokens(list(range(260)))
    assert tokens[260] == "[PAD260]" and len(tokens) == len(types) == VOCAB_SIZE
    assert types == [1] * 256 + [3] * 3 + [4] + [5] * (VOCAB_SIZE - 260)
    ids = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ids == [256, 257, 258]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def byte_level(pre: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> PreTrainedTokenizerFast:
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "th": 256}, merges=[("t", "h")], ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def split(digits: str) -> Any:
    from tokenizers import Regex

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {"pre": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])},
    "llama-bpe": {"pre": split(r"\p{N}{1,3}"), "ignore_merges": True},
    "dbrx": {"pre": split(r"\p{N}{1,3}")},
    "qwen2": {"pre": split(r"\p{N}"), "normalizer": normalizers.NFC()},
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_known_pre_tokenizers(tmp_path: Path, name: str) -> None:
    source = save_pruned(tmp_path / "pruned", tokenizer=byte_level(**PRE_TOKENIZERS[name]))
    export(source, tmp_path / "model.gguf", verify=False)
    fields = Interpreter(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.merges"] == ["t h"]
    assert fields["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize(
    "options",
    [
        {"pre": split(r"\p{N}{1,2}")},
        {"pre": pre_tokenizers.ByteLevel(True)},
        {"pre": pre_tokenizers.ByteLevel(False), "ignore_merges": True},
        {"pre": pre_tokenizers.ByteLevel(False), "normalizer": normalizers.Lowercase()},
    ],
    ids=["regex", "space first", "ignore merges", "lower case"],
)
def test_unknown_pre_tokenizers_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    source = save_pruned(tmp_path / "pruned", tokenizer=byte_level(**options))
    with pytest.raises(CheckpointError) as caught:
        export(source, tmp_path / "model.gguf", verify=False)
    one_sentence(caught, "pre-tokenizer", "--tokenizer-from FILE")
    assert not (tmp_path / "model.gguf").exists() and alone(tmp_path / "model.gguf")


def sentencepiece_like(merges: list[tuple[str, str]], **changes: Any) -> PreTrainedTokenizerFast:
    letters = ["\u2581", "t", "h", "e", "a"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    texts += dict.fromkeys(left + right for left, right in merges)
    vocab = {text: index for index, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    for name, part in changes.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False
    )


MERGES = [("t", "h"), ("\u2581", "th"), ("th", "e"), ("\u2581", "the"), ("\u2581th", "e"), ("\u2581", "a")]


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentencepiece_like_tokenizer(tmp_path: Path, metaspace: bool) -> None:
    part = {"normalizer": None, "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first", split=False)}
    tokenizer = sentencepiece_like(MERGES, **(part if metaspace else {}))
    source = save_pruned(tmp_path / "pruned", tokenizer=tokenizer, vocab_size=280)
    export(source, tmp_path / "model.gguf", verify=False)
    fields = Interpreter(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.ggml.merges" not in fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and types[:4] == [2, 3, 3, 6]
    assert types[258:260] == [6, 1] and tokens[259] == "\u2581"
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    joined = list(dict.fromkeys(left + right for left, right in MERGES))
    assert sorted(joined, key=scores.__getitem__, reverse=True) == joined
    assert all(scores[text] > scores["t"] for text in joined)
    for text in ("the a the", "a  hat", "the"):
        assert spm(text, scores) == tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


def test_tokenizer_of_gemma(tmp_path: Path) -> None:
    """It replaces all spaces and then splits at spaces, of which there are none left; no space is put in front."""
    tokenizer = sentencepiece_like(
        MERGES,
        normalizer=normalizers.Replace(" ", "\u2581"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
    )
    source = save_pruned(tmp_path / "pruned", tokenizer=tokenizer, vocab_size=280)
    export(source, tmp_path / "model.gguf", verify=False)
    fields = Interpreter(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is False
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    for text in ("the a the", "a  hat", " the"):
        found = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
        assert spm(text, scores, first="") == found


def spm(text: str, scores: dict[str, float], first: str = "\u2581") -> list[str]:
    """Join the two neighbours whose union has the highest score, as llama.cpp does."""
    pieces = list(first + text.replace(" ", "\u2581"))
    while True:
        pairs = enumerate(zip(pieces, pieces[1:], strict=False))
        unions = [(scores[left + right], -i) for i, (left, right) in pairs if left + right in scores]
        if not unions:
            return pieces
        i = -max(unions)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def test_byte_fallback_that_is_not_sentencepiece_is_refused(tmp_path: Path) -> None:
    apart = [("t", "h"), ("h", "e"), ("th", "e"), ("\u2581", "a"), ("t", "he")]
    cases: dict[str, tuple[PreTrainedTokenizerFast, str]] = {
        "order": (sentencepiece_like(apart), "order"),
        "marks": (sentencepiece_like(MERGES, normalizer=normalizers.Lowercase()), "Lowercase"),
        "digits": (sentencepiece_like(MERGES, pre_tokenizer=pre_tokenizers.Digits(True)), "Digits"),
    }
    for name, (tokenizer, word) in cases.items():
        source = save_pruned(tmp_path / name, tokenizer=tokenizer, vocab_size=280)
        with pytest.raises(CheckpointError) as caught:
            export(source, tmp_path / "model.gguf", verify=False)
        one_sentence(caught, word, "--tokenizer-from FILE")


def test_tokenizers_that_cannot_be_expressed(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "pruned")
    path = source / "tokenizer.json"
    good = path.read_text()
    unigram = json.loads(good)
    unigram["model"]["type"] = "Unigram"
    larger = json.loads(good)
    larger["added_tokens"][-1]["id"] = VOCAB_SIZE
    cases = {
        json.dumps(unigram): ("Unigram", "--tokenizer-from FILE"),
        json.dumps(larger): (str(VOCAB_SIZE + 1), str(VOCAB_SIZE), "without an embedding"),
        good[:50]: ("tokenizer.json", "is not JSON"),
    }
    for content, words in cases.items():
        path.write_text(content)
        with pytest.raises(CheckpointError) as caught:
            export(source, tmp_path / "model.gguf", verify=False)
        one_sentence(caught, *words)
    path.unlink()
    with pytest.raises(CheckpointError) as caught:
        export(source, tmp_path / "model.gguf", verify=False)
    one_sentence(caught, "no tokenizer.json", "--tokenizer-from FILE")


def test_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a layer is alive when the next layer is loaded."""
    import gc
    import weakref

    source = save_pruned(tmp_path / "pruned")
    alive: list[weakref.ref[torch.Tensor]] = []
    real = exporter.PrunedCheckpoint.load_layer

    def load(self: Any, index: int) -> Any:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        layer = real(self, index)
        alive[:] = [weakref.ref(layer.ffn.down), weakref.ref(layer.attention.k)]
        return layer

    monkeypatch.setattr(exporter.PrunedCheckpoint, "load_layer", load)
    export(source, tmp_path / "model.gguf", verify=False)
