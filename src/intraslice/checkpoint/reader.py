"""A dense checkpoint on disk, read one decoder layer at a time.

Everything that can be checked without reading weights (config, names, shapes, whole files) is checked when it
is opened; NaN and Inf are found when a tensor is loaded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from intraslice.border import foreign
from intraslice.checkpoint.composite import Composite, take_apart, text_tensors
from intraslice.checkpoint.folder import check_architecture, composites, read_config, read_headers, with_digests
from intraslice.checkpoint.tensorfile import DTYPES, StoredTensor, read_stored
from intraslice.checkpoint.tokenizer import open_tokenizer
from intraslice.checkpoint.writer import side_files
from intraslice.digests import bytes_digest, file_digest
from intraslice.errors import CheckpointError, NumericalError, UnsupportedModelError, one_line
from intraslice.layers.state_dict import as_linears
from intraslice.runtime.configuration_intraslice import dense_shapes, family_of, rotary_dim, rotated
from intraslice.runtime.families_intraslice import FamilySpec

OUTPUT_EMBEDDING = "lm_head.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Llama checkpoints of 2023 carry this buffer; every version of transformers since then computes it.
_INV_FREQ = r"rotary_emb\.inv_freq$"


class Checkpoint:
    """A dense model as a folder of safetensors files; made by `open_checkpoint` or `open_folder`.

    Attributes:
        name: the model as the user gave it.
        folder: local folder with weights, config and tokenizer.
        config: stock Hugging Face config.
        spec: where things are in this family.
        dtype: dtype of the stored decoder-layer matrices.
        tied: whether the output head is the embedding matrix.
        trust_remote_code: whether the user allowed code of the model (only a tokenizer can have any).
        composite: what surrounds the model, when it is the text tower of a composite checkpoint; else None.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        config: Any,
        spec: FamilySpec,
        tensors: dict[str, StoredTensor],
        *,
        trust_remote_code: bool = False,
        composite: Composite | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.config = config
        self.spec = spec
        self.trust_remote_code = trust_remote_code
        self.composite = composite
        self.tied = bool(config.tie_word_embeddings)
        self._tensors = tensors
        self._identity: dict[str, Any] | None = None
        check_shapes(config, spec, name)
        self._check_against_config()
        matrices = [
            tensor.dtype
            for key, tensor in self._tensors.items()
            if key.startswith(spec.layers) and len(tensor.shape) == 2
        ]
        self.dtype: torch.dtype = DTYPES[Counter(matrices).most_common(1)[0][0]]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    def layer_prefix(self, index: int) -> str:
        """Return what the names of layer `index` begin with, for example "model.layers.3."."""
        return f"{self.spec.layers}.{index}."

    def load_layer(self, index: int) -> dict[str, torch.Tensor]:
        """Load the tensors of one layer into memory of their own, as stored (no cast), matrices as [out, in].

        Args:
            index: layer, from 0.

        Returns:
            Tensors by name relative to the layer.

        Raises:
            NumericalError: a weight is NaN or infinite.
            CheckpointError: the file cannot be read any more.
        """
        prefix = self.layer_prefix(index)
        names = [name for name in self._tensors if name.startswith(prefix)]
        tensors = {name[len(prefix) :]: self._load(name, f"layer {index}") for name in names}
        return as_linears(tensors, self.spec)

    def load_rest(self) -> dict[str, torch.Tensor]:
        """Load every tensor outside the decoder layers by full name; a tied output head is left out.

        Raises:
            NumericalError: a weight is NaN or infinite.
            CheckpointError: the file cannot be read any more.
        """
        prefix = f"{self.spec.layers}."
        return {name: self._load(name) for name in self._tensors if not name.startswith(prefix)}

    @property
    def carried(self) -> dict[str, StoredTensor]:
        """What surrounds the text tower of a composite, by the names to store it under; nothing for other models."""
        return {} if self.composite is None else self.composite.tensors

    def saved_name(self, name: str) -> str:
        """Return the name under which a pruned checkpoint stores a tensor, or the tensors of a layer prefix."""
        return name if self.composite is None else self.composite.saved_name(name)

    def num_parameters(self) -> int:
        """Return the number of stored parameters, tied tensors once, what surrounds a text tower included."""
        return sum(tensor.num_elements for part in (self._tensors, self.carried) for tensor in part.values())

    def skeleton(self, dtype: torch.dtype | None = None) -> Any:
        """Return the stock causal language model without weights (meta device)."""
        return build_skeleton(self.config, self.name, dtype or self.config.dtype or torch.float32)

    def load_tokenizer(self) -> Any:
        """Return the tokenizer of the model.

        Raises:
            CheckpointError: there is none, it cannot be read, or it needs code that was not allowed.
        """
        config = self.config if self.composite is None else self.composite.config
        return open_tokenizer(self.folder, self.name, config, trust_remote_code=self.trust_remote_code)

    def identity(self) -> dict[str, Any]:
        """Return digests of everything that decides what the model is: "config", "weights" and the other "files".

        All bytes of all weights are read, the first time; independent of the folder's name and of how tensors are
        sharded. What is loaded from then on is compared with it.

        Raises:
            CheckpointError: a file cannot be read.
        """
        if self._identity is None:
            self._identity = self._read_identity()
        return self._identity

    def fingerprint(self) -> str:
        """Return the digest of `identity`.

        Raises:
            CheckpointError: a file cannot be read.
        """
        return bytes_digest(json.dumps(self.identity(), sort_keys=True).encode())

    def _read_identity(self) -> dict[str, Any]:
        config = self.config if self.composite is None else self.composite.config
        try:
            self._tensors = with_digests(self._tensors)
            if self.composite is not None:
                self.composite = replace(self.composite, tensors=with_digests(self.composite.tensors))
            files = self._side_files()
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.name!r} cannot be read any more: {one_line(error)}") from error
        tensors = {**self._tensors, **self.carried}
        lines = [f"{name} {found.dtype} {found.shape} {found.digest}" for name, found in sorted(tensors.items())]
        return {
            "config": bytes_digest(json.dumps(_plain_config(config), sort_keys=True).encode()),
            "weights": bytes_digest("\n".join(lines).encode()),
            "files": files,
        }

    def _side_files(self) -> dict[str, str]:
        paths = side_files(self.folder, composite=self.composite is not None)
        return {path.name: file_digest(path) for path in paths}

    def check_side_files(self) -> None:
        """Refuse to copy files that are not those that `identity` has found.

        Raises:
            CheckpointError: with the first one that has changed.
        """
        before, now = self.identity()["files"], self._side_files()
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise CheckpointError(
                    f"{name!r} of {self.name!r} has changed during the run; put it back, and repeat the command with "
                    "--resume."
                )

    def check_unchanged(self) -> None:
        """Read everything again, and refuse to go on if anything has changed since `identity`.

        Raises:
            CheckpointError: the model is another one now.
        """
        before, self._identity = self.identity(), None
        if self.identity() != before:
            raise CheckpointError(
                f"{self.name!r} has changed while it was in use; put it back, and repeat the command with --resume."
            )

    def _load(self, name: str, where: str = "") -> torch.Tensor:
        tensor = read_stored(self._tensors[name])
        if tensor.numel():
            # The extremes are NaN if any element is, and need no memory, unlike isfinite on the whole tensor.
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                place = f"{name!r} ({where})" if where else repr(name)
                raise NumericalError(f"weight {place} of {self.name!r} holds NaN or infinite values")
        return tensor

    def _check_against_config(self) -> None:
        skeleton = self.skeleton()
        expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        self._check_heads(expected)
        tensors = self._under_state_names(expected) if self.spec.renames else self._tensors
        if not any(name in expected for name in tensors):
            # Saved from the class without a head: the names lack the attribute of the body.
            body = self.spec.layers.split(".")[0]
            if any(f"{body}.{name}" in expected for name in tensors):
                tensors = {f"{body}.{name}": tensor for name, tensor in tensors.items()}
        # Buffers of older releases, of which the class itself says that it makes them.
        computed = [_INV_FREQ, *(skeleton._keys_to_ignore_on_load_unexpected or ())]
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if name in expected or not any(re.search(pattern, name) for pattern in computed)
        }
        self._tensors = tensors
        if self.tied:
            embeddings = skeleton.get_input_embeddings()
            self._drop_tied_head(next(name for name, module in skeleton.named_modules() if module is embeddings))
            expected.pop(OUTPUT_EMBEDDING, None)
        missing = [name for name in expected if name not in tensors]
        extra = [name for name in tensors if name not in expected]
        if missing:
            raise CheckpointError(
                f"checkpoint {self.name!r} lacks {_some(missing)} that its config.json asks for; "
                "download it again or check the config"
            )
        if extra:
            raise CheckpointError(
                f"checkpoint {self.name!r} holds {_some(extra)} that its config.json does not know; "
                "check that config and weights belong together"
            )
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"tensor {name!r} of {self.name!r} has shape {list(tensors[name].shape)}, but its "
                    f"config.json asks for {list(shape)}; check that config and weights belong together"
                )
            if tensors[name].dtype not in _FLOATS:
                raise UnsupportedModelError(
                    f"tensor {name!r} of {self.name!r} is stored as {tensors[name].dtype}: quantised "
                    "checkpoints cannot be pruned; use the model in float32, bfloat16 or float16"
                )

    def _check_heads(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse numbers of heads with which the stock class can be built, but not run.

        Args:
            expected: shapes of the tensors of the stock class.
        """
        spec = self.spec
        for index, shape in enumerate(dense_shapes(self.config, spec)):
            for path, size in spec.linear_sizes(shape, self.config.hidden_size).items():
                found = expected.get(f"{spec.layers}.{index}.{path}.weight", size)
                if (found[::-1] if spec.transposed else found) != size:
                    raise CheckpointError(
                        f"config.json of {self.name!r} has {shape.num_attention_heads} heads of {shape.qk_head_dim} "
                        f"channels and {shape.num_key_value_heads} kv heads, which the {spec.name} class of "
                        f"transformers cannot run: its {path} has the shape {list(found)} with them; check the config"
                    )

    def _under_state_names(self, expected: Collection[str]) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        for stored, tensor in self._tensors.items():
            name = stored if stored in expected else self.spec.state_name(stored)
            if name in tensors:
                raise CheckpointError(
                    f"checkpoint {self.name!r} holds {name!r} twice, as {tensors[name].name!r} and as {stored!r}; "
                    "leave one of them out"
                )
            tensors[name] = tensor
        return tensors

    def _drop_tied_head(self, embeddings: str) -> None:
        head = self._tensors.pop(OUTPUT_EMBEDDING, None)
        if head is None:
            return
        matrix = self._tensors.get(f"{embeddings}.weight")
        if matrix is not None and (head.shape != matrix.shape or not _same(head, matrix)):
            raise CheckpointError(
                f"config.json of {self.name!r} ties {OUTPUT_EMBEDDING} to the embeddings, but the stored "
                "tensors differ; set tie_word_embeddings to false in config.json"
            )


def open_folder(folder: Path, *, name: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Open a local folder with safetensors files and config.json.

    Args:
        folder: the folder.
        name: how messages call the model; the folder's name by default.
        trust_remote_code: whether code of the model's tokenizer may run.

    Raises:
        UnsupportedModelError: the architecture is not supported, is quantised, or is pruned already.
        CheckpointError: files are missing, corrupt or unsafe, or contradict the config.
    """
    name = name or str(folder)
    model_type = check_architecture(folder, name)["model_type"]
    tensors = read_headers(folder, name)
    if model_type in composites():
        # Before layers are counted: that there is no text tower says more than that it has no layers.
        text_tensors(name, model_type, tensors)
    config = read_config(folder, name, tensors)
    composite = None
    if config.model_type in composites():
        config, tensors, composite = take_apart(name, config, tensors)
    return Checkpoint(
        name,
        folder,
        config,
        family_of(config),
        tensors,
        trust_remote_code=trust_remote_code,
        composite=composite,
    )


def check_shapes(config: Any, spec: FamilySpec, name: str) -> None:
    """Refuse a config of which no layer can be built: with sizes that are none, or RoPE settings of another type.

    Args:
        config: stock or pruned config.
        spec: its family.
        name: how messages call the model.

    Raises:
        CheckpointError: with what is wrong.
    """
    with foreign(f"config.json of {name!r} is not valid", CheckpointError):
        for index in range(len(dense_shapes(config, spec))):
            if rotated(config, spec, index):
                rotary_dim(config, index)


def build_skeleton(config: Any, name: str, dtype: torch.dtype) -> Any:
    """Return the stock causal language model of a config without weights (meta device).

    Its attention is sdpa, or eager where that leaves something out (a cap of the scores).

    Raises:
        CheckpointError: no model can have such a config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    # Some values only a model finds impossible, such as an unknown activation.
    with foreign(f"config.json of {name!r} is not valid", CheckpointError), torch.device("meta"):
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        # Not all releases of transformers say of classes with a cap that sdpa does not know it.
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        attention = "sdpa" if model_class._supports_sdpa and not capped else "eager"
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def _plain_config(config: Any) -> dict[str, Any]:
    # Keys that say where a config came from or who wrote it, not what the model is.
    ignored = ("_name_or_path", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in ignored}


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    with safe_open(a.path, framework="pt") as file_a, safe_open(b.path, framework="pt") as file_b:
        return torch.equal(file_a.get_tensor(a.name), file_b.get_tensor(b.name))


def _some(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
