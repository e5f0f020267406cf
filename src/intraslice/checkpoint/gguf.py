"""GGUF files, converted once into a safetensors folder that everything else can read layer by layer.

Config and tokenizer come from transformers' own GGUF reading; weights are dequantised here in blocks of rows,
so that memory stays at one tensor. Whatever transformers would drop silently (scaled RoPE, tensors without a
counterpart) is refused.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from intraslice.border import foreign
from intraslice.checkpoint.gguf_header import read_header
from intraslice.checkpoint.ownership import LIST_FILE, verify_folder, write_list
from intraslice.checkpoint.reader import OUTPUT_EMBEDDING, build_skeleton
from intraslice.checkpoint.tensorfile import TensorFile, TensorSlot
from intraslice.checkpoint.writer import plan_shards, shard_names, write_index
from intraslice.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from intraslice.files import writing
from intraslice.names import expanded
from intraslice.progress import Progress, SilentProgress
from intraslice.quiet import quiet
from intraslice.runtime.families_intraslice import FAMILIES

# Part of the cache key: raise it when the conversion changes.
CONVERSION_VERSION = 1
_FAMILY_OF = {spec.gguf: spec for spec in FAMILIES.values() if spec.gguf is not None}
ARCHITECTURES = tuple(_FAMILY_OF)
_CHUNK_ELEMENTS = 1 << 22
_SHARD_BYTES = 1 << 30
_STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """Return the folder of converted models: $INTRASLICE_CACHE, or the platform's cache folder."""
    if os.environ.get("INTRASLICE_CACHE"):
        return expanded(os.environ["INTRASLICE_CACHE"])
    return user_cache_path("intraslice", appauthor=False, opinion=False)


def convert_gguf(path: Path, *, name: str | None = None, progress: Progress | None = None) -> Path:
    """Return a float32 safetensors folder with the same model; converted on first use, then cached.

    What is in the cache is compared with its digests, and converted again if it is something else.

    Args:
        path: GGUF file of a Llama, Mistral, Qwen2 or Phi-3 model, quantised or not.
        name: how messages call the model.
        progress: shows the conversion.

    Returns:
        Folder in the cache; its name is a hash of the file's content.

    Raises:
        MissingExtraError: the package gguf is not installed.
        CheckpointError: the file is corrupt, or holds something that would be lost.
        UnsupportedModelError: the architecture is not supported.
        OutputError: the cache cannot be written.
    """
    name = name or str(path)
    progress = progress or SilentProgress()
    # Before the content is hashed, which takes minutes for gigabytes that no tensor claims.
    reader = _open(path, name)
    key = _content_key(path)
    final = cache_folder() / key
    if _is_whole(final):
        return final
    if final.exists():
        progress.note(f"the cached conversion of {name} is not what was written: it is converted again")
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(final.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f"{key[:16]}.partial-", dir=final.parent))
    try:
        _convert(reader, path, name, temporary / "new", progress)
        write_list(temporary / "new")
        with writing(final):
            if _is_whole(final):
                # Another process has mended a damaged one meanwhile, and may be reading it already.
                return final
            try:
                if final.exists():
                    os.replace(final, temporary / "old")
                os.replace(temporary / "new", final)
            except OSError:
                # Another process has finished the same file meanwhile; its folder is as good.
                if not _is_whole(final):
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _is_whole(folder: Path) -> bool:
    """Return whether a folder of the cache is there, and every file in it is what was written."""
    if not (folder / LIST_FILE).is_file():
        return False
    try:
        found = verify_folder(folder, str(folder))
    except CheckpointError:
        return False
    return not (found.changed or found.missing or found.others)


def read_gguf_config(path: Path, name: str) -> Any:
    """Return the config of a GGUF file as transformers reads it; no weights are read or converted.

    Raises:
        CheckpointError: the file is corrupt.
        UnsupportedModelError: the architecture is not supported.
        MissingExtraError: the package gguf is not installed.
    """
    from transformers import AutoConfig

    _open(path, name)
    with foreign(f"the config of {name!r} cannot be read", CheckpointError), quiet("transformers"):
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)


def _convert(reader: Any, path: Path, name: str, folder: Path, progress: Progress) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    config = read_gguf_config(path, name)
    with foreign(f"the tokenizer of {name!r} cannot be read", CheckpointError), quiet("transformers"):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    _complete_config(config, reader, name)
    model = build_skeleton(config, name, torch.float32)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(OUTPUT_EMBEDDING, None)
    sources = _match_names(reader, shapes, config.num_hidden_layers, name)

    with writing(folder):
        folder.mkdir()
    slots = {key: TensorSlot(torch.float32, shapes[key]) for key in sources}
    shards = plan_shards(slots, _SHARD_BYTES)
    file_names = shard_names(len(shards))
    total = sum(slot.nbytes for slot in slots.values())
    with progress.step(f"Converting {name}", total) as advance, open(path, "rb") as file:
        for file_name, keys in zip(file_names, shards, strict=True):
            with TensorFile(folder / file_name, {key: slots[key] for key in keys}) as shard:
                for key in shard.names:
                    weight = _dequantize(file, sources[key], shapes[key], name)
                    shard.write(key, _restored(weight, sources[key].name, _architecture(reader), config))
                    advance(slots[key].nbytes)
    if len(shards) > 1:
        write_index(folder, dict(zip(file_names, shards, strict=True)), slots)
    with writing(folder):
        tokenizer.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        config.save_pretrained(folder)


def _open(path: Path, name: str) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError(
            f"{name!r} is a GGUF file, and the package to read it is missing: pip install 'intraslice[gguf]'"
        ) from error
    header = read_header(path, name)
    architecture = header.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF file {name!r} has the architecture {architecture!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    header.check_blocks(name)
    with foreign(f"GGUF file {name!r} is truncated or corrupt", CheckpointError, "; download it again"):
        return GGUFReader(path)


def _architecture(reader: Any) -> str:
    return reader.fields["general.architecture"].contents()


def _field(reader: Any, key: str) -> Any:
    field = reader.fields.get(f"{_architecture(reader)}.{key}")
    return None if field is None else field.contents()


def _complete_config(config: Any, reader: Any, name: str) -> None:
    scaling = _field(reader, "rope.scaling.type")
    if scaling not in (None, "none"):
        raise CheckpointError(
            f"GGUF file {name!r} scales its rotary embedding ({scaling}), which the conversion would lose; "
            "use the safetensors version of the model"
        )
    with foreign(f"the config of {name!r} is not valid", CheckpointError):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if heads % kv_heads or head_dim < 1:
            raise ValueError(f"{heads} heads of {head_dim} channels share {kv_heads} kv heads")
    rotary_dim = _field(reader, "rope.dimension_count")
    if rotary_dim not in (None, head_dim):
        raise CheckpointError(
            f"GGUF file {name!r} rotates {rotary_dim} of {head_dim} head channels, which the "
            "conversion would lose; use the safetensors version of the model"
        )
    window = _field(reader, "attention.sliding_window")
    field = FAMILIES[config.model_type].sliding_window
    if field is not None and window:
        setattr(config, field, int(window))
    config.dtype = torch.float32
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    # The weights are plain floats from here on.
    config.__dict__.pop("quantization_config", None)


def _match_names(reader: Any, shapes: dict[str, tuple[int, ...]], num_layers: int, name: str) -> dict[str, Any]:
    """Return the GGUF tensor of each Hugging Face name."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = _architecture(reader)
    number = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    names = get_tensor_name_map(number, num_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sources = {}
    for key, shape in shapes.items():
        stem, suffix = key.rsplit(".", 1)
        tensor = tensors.pop(f"{names.get_name(stem)}.{suffix}", None)
        if tensor is None:
            raise CheckpointError(f"GGUF file {name!r} has no tensor for {key!r}; it is incomplete")
        stored = tuple(int(size) for size in reversed(tensor.shape))
        if stored != shape:
            raise CheckpointError(
                f"tensor {tensor.name!r} of {name!r} has shape {list(stored)}, but its metadata ask for {list(shape)}"
            )
        sources[key] = tensor
    if tensors:
        raise CheckpointError(
            f"GGUF file {name!r} holds {next(iter(tensors))!r}, which the conversion would lose; "
            "use the safetensors version of the model"
        )
    return sources


def _dequantize(file: Any, source: Any, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """Read one tensor as float32; never more than a few rows in other forms besides it."""
    import numpy as np
    from gguf import dequantize

    # Read, not mapped: pages of a mapped file would stay resident until the end.
    rows = shape[0] if len(shape) > 1 else 1
    out = torch.empty(shape, dtype=torch.float32)
    flat = out.view(rows, -1)
    row_bytes = int(source.n_bytes) // rows
    step = max(_CHUNK_ELEMENTS // max(flat.shape[1], 1), 1)
    file.seek(int(source.data_offset))
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        raw = np.frombuffer(file.read(count * row_bytes), dtype=np.uint8)
        if raw.size != count * row_bytes:
            raise CheckpointError(f"GGUF file {name!r} is truncated inside {source.name!r}; download it again")
        block = raw.reshape(count, row_bytes).view(source.data.dtype)
        flat[begin : begin + count] = torch.from_numpy(np.array(dequantize(block, source.tensor_type)))
    return out


def _restored(weight: torch.Tensor, gguf_name: str, architecture: str, config: Any) -> torch.Tensor:
    """Undo what llama.cpp changes of the weights of some architectures.

    It stores the two channels of a rotary pair side by side; Hugging Face has all first channels of a head,
    then all second ones. And where a norm adds something to its weight, it stores the sum.
    """
    if "norm" in gguf_name:
        return weight - _FAMILY_OF[architecture].norm_offset
    if not _FAMILY_OF[architecture].gguf_interleaved or not any(part in gguf_name for part in (".attn_q.", ".attn_k.")):
        return weight
    heads = config.num_attention_heads if ".attn_q." in gguf_name else config.num_key_value_heads
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _content_key(path: Path) -> str:
    digest = hashlib.sha256(f"conversion {CONVERSION_VERSION}".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


def _remove_stale(folder: Path) -> None:
    """Remove what conversions that were killed long ago have left behind."""
    for path in folder.glob("*.partial-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
