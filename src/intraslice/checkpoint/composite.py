"""Composite (vision-language) checkpoints: the text tower is a model by itself, everything else is only carried along.

The tower is known by the names that its stock ForCausalLM class has ("model.layers.3.", "lm_head."). On disk there are
several layouts of names around it, older and newer ones; what is written has the names of the composite's state dict.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from intraslice.border import foreign
from intraslice.checkpoint.folder import composites
from intraslice.checkpoint.tensorfile import DTYPES, StoredTensor
from intraslice.errors import CheckpointError, UnsupportedModelError
from intraslice.runtime.families_intraslice import FAMILIES

_PRUNED_PREFIX = "intraslice_"
_BODY = "model."
_TOWER = "model.language_model."
_HEAD = "lm_head."
# Beginnings of names on disk, and what stands there in the ForCausalLM class of the text tower; the first one counts.
_TEXT_NAMES = (
    ("language_model.lm_head.", _HEAD),
    # The class without a head inside of the tower, as some releases of transformers write it.
    ("model.language_model.model.", _BODY),
    ("model.language_model.", _BODY),
    ("language_model.model.", _BODY),
    ("language_model.", _BODY),
    (_HEAD, _HEAD),
)


@dataclass(frozen=True)
class Composite:
    """What surrounds a text tower.

    Attributes:
        config: stock config of the whole.
        tensors: everything but the text tower, by its name in the composite's state dict.
    """

    config: Any
    tensors: dict[str, StoredTensor]

    @property
    def model_type(self) -> str:
        """Its architecture, for example "mistral3"."""
        return self.config.model_type

    @staticmethod
    def saved_name(name: str) -> str:
        """Return the name in the composite of a tensor of the text tower."""
        return _TOWER + name[len(_BODY) :] if name.startswith(_BODY) else name


def text_name(stored: str) -> str | None:
    """Return the name in the text tower's ForCausalLM class of a stored tensor; None when it lies outside of it."""
    for prefix, known in _TEXT_NAMES:
        if stored.startswith(prefix):
            return known + stored[len(prefix) :]
    return None


def text_tensors(name: str, model_type: str, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of the text tower of a composite, by their names in its ForCausalLM class.

    Raises:
        CheckpointError: there are none, or one is there twice.
    """
    found: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        known = text_name(stored)
        if known is None:
            continue
        if known in found:
            raise CheckpointError(
                f"checkpoint {name!r} holds {known!r} of its text tower twice, as {found[known].name!r} and as "
                f"{stored!r}; leave one of them out"
            )
        found[known] = tensor
    if not any(known.startswith(_BODY) for known in found):
        raise CheckpointError(
            f"{name!r} is a composite checkpoint ({model_type}) without a text tower: no tensor is called "
            f"{_TOWER!r}… or 'language_model.'…; give the whole model"
        )
    return found


def take_apart(
    name: str, config: Any, tensors: dict[str, StoredTensor]
) -> tuple[Any, dict[str, StoredTensor], Composite]:
    """Take a composite apart into its text tower and the rest.

    Args:
        name: how messages call the model.
        config: stock config of the composite.
        tensors: all that is stored, by the names on disk.

    Returns:
        The config of the text tower, its tensors by their names in its ForCausalLM class, and the rest.

    Raises:
        CheckpointError: there is no text tower, or the rest does not belong to the config.
    """
    text = text_tensors(name, config.model_type, tensors)
    rest = {
        stored if stored.startswith(_BODY) else _BODY + stored: tensor
        for stored, tensor in tensors.items()
        if text_name(stored) is None
    }
    _check_rest(name, config, rest)
    config = copy.deepcopy(config)
    tower = config.text_config
    # transformers too leaves matrices apart that are stored apart, whatever the config says, which is often silent.
    tied = bool(config.tie_word_embeddings) and not _stored_apart(text)
    config.tie_word_embeddings = tower.tie_word_embeddings = tied
    tower.dtype = tower.dtype or config.dtype
    return copy.deepcopy(tower), text, Composite(config, rest)


def load_arguments(config: Any, *, of_composite: bool = False) -> dict[str, Any]:
    """Return what `AutoModelForCausalLM.from_pretrained` needs besides the folder, to load the model of this config.

    Args:
        config: dense or pruned; of a composite the whole, or that of its text tower, which is what is loaded.
        of_composite: the folder is that of a composite, and the config that of its text tower.

    Returns:
        The config, so that config.json is not read again behind our back, and names on disk that are others.
    """
    if of_composite or is_composite(config):
        pairs = tuple((stored, known) for stored, known in _TEXT_NAMES if stored != known)
    else:
        pairs = FAMILIES[config.model_type].renames if config.model_type in FAMILIES else ()
    names = {"key_mapping": {f"^{re.escape(stored)}": known for stored, known in pairs}} if pairs else {}
    return {"config": text_config(config), **names}


def is_composite(config: Any) -> bool:
    """Return whether a config is that of a composite whose text tower we know, dense or pruned."""
    return config.model_type.removeprefix(_PRUNED_PREFIX) in composites()


def text_config(config: Any) -> Any:
    """Return the config of the text tower of a composite, complete for a model of its own; else the config itself."""
    if not is_composite(config):
        return config
    tower = copy.deepcopy(config.text_config)
    tower.tie_word_embeddings = config.tie_word_embeddings
    tower.dtype = tower.dtype or config.dtype
    if config.model_type.startswith(_PRUNED_PREFIX):
        # Not at the top: it imports transformers, and this module is read by code that must not wait for it.
        from intraslice.runtime.configuration_intraslice import class_names

        for field, value in class_names(type(tower)).items():
            setattr(tower, field, value)
    return tower


def _stored_apart(text: dict[str, StoredTensor]) -> bool:
    head, embeddings = text.get(f"{_HEAD}weight"), text.get(f"{_BODY}embed_tokens.weight")
    if head is None or embeddings is None:
        return False
    with safe_open(head.path, framework="pt") as file_a, safe_open(embeddings.path, framework="pt") as file_b:
        return not torch.equal(file_a.get_tensor(head.name), file_b.get_tensor(embeddings.name))


def _check_rest(name: str, config: Any, rest: dict[str, StoredTensor]) -> None:
    """Compare what is stored with the modules of the composite.

    Names inside of a module are its own affair: transformers renames some when it loads them, and no renaming
    changes how many values a module has.
    """
    from transformers import AutoModelForImageTextToText

    with foreign(f"config.json of {name!r} is not valid", CheckpointError), torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(config)
    expected: Counter[str] = Counter()
    for known, tensor in skeleton.state_dict().items():
        if text_name(known) is None:
            expected[_module(known)] += tensor.numel()
    stored: Counter[str] = Counter()
    for known, tensor in rest.items():
        stored[_module(known)] += tensor.num_elements
    for module, size in expected.items():
        if stored[module] < size:
            raise CheckpointError(
                f"checkpoint {name!r} lacks weights of {module!r}: it holds {stored[module]} values of the {size} that "
                "its config.json asks for; download it again or check the config"
            )
    for known, tensor in rest.items():
        if tensor.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"tensor {known!r} of {name!r} is stored as {tensor.dtype}: quantised checkpoints cannot be pruned; "
                "use the model in float32, bfloat16 or float16"
            )
    unknown = sorted(stored.keys() - expected.keys())
    if unknown:
        raise CheckpointError(
            f"checkpoint {name!r} holds weights of {unknown[0]!r}, which its config.json does not know; "
            "check that config and weights belong together"
        )


def _module(name: str) -> str:
    return name.split(".")[1]
