"""Configs of pruned models.

This file travels with every pruned checkpoint (`trust_remote_code=True`), so it may import only the standard
library, torch, transformers, huggingface_hub and its neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .families_intraslice import FAMILIES, FamilySpec, LayerShape

MIN_TRANSFORMERS = "5.16"
"""The oldest release that knows sizes per layer; older ones would fail later, and say less."""
if [int(part) for part in transformers.__version__.split(".")[:2]] < [
    int(part) for part in MIN_TRANSFORMERS.split(".")
]:
    raise ImportError(
        f"a pruned checkpoint needs transformers {MIN_TRANSFORMERS} or later, {transformers.__version__} is installed; "
        "upgrade it, or export the checkpoint with `intraslice export --to stock` or `--to padded`."
    )

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""What a layer or a model calls the cache that it is handed: from transformers 5.24, before that, and in the layers of
GPT-NeoX and Falcon."""
_CALLS_IT_CACHE = [int(part) for part in transformers.__version__.split(".")[:2]] >= [5, 24]
CACHE_ARGUMENT = "cache" if _CALLS_IT_CACHE else "past_key_values"
"""What models of the installed transformers call it."""

FORMAT_VERSION = 1
PREFIX = "IntraSlice"
MODEL_TYPE_PREFIX = "intraslice_"


def family_of(config: PretrainedConfig) -> FamilySpec:
    """Return the row of the family table for a stock or a pruned config, with what the config switches."""
    return FAMILIES[config.model_type.removeprefix(MODEL_TYPE_PREFIX)].of_config(config)


def config_values(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a config by their names, and by those under which other families have them.

    Unlike attributes they can be read while there are values per layer.
    """
    values = vars(config)
    return {**values, **{name: values[own] for name, own in config.attribute_map.items() if own in values}}


def _dense_overrides(config: PretrainedConfig) -> dict[str, dict[str, Any]] | None:
    """Return the sizes per layer that the dense model itself has, by layer; None where its config has none.

    In a pruned config `per_layer_config` holds the pruned sizes, and the dense ones stand aside.
    """
    record = vars(config).get("intraslice")
    if record is None:
        return config.to_dict().get("per_layer_config")
    return record.get("dense", {}).get("per_layer_config")


def _dense_values(config: PretrainedConfig, layer_idx: int) -> dict[str, Any]:
    """Return the fields of the dense model's config for one layer."""
    if vars(config).get("intraslice") is None:
        return config_values(config.per_layer_config[layer_idx])
    overrides = _dense_overrides(config) or {}
    # JSON has made strings of the layers, perhaps with zeros in front.
    own = next((values for key, values in overrides.items() if int(key) == layer_idx), {})
    return {**config_values(config), **own}


def dense_head_dim(config: PretrainedConfig, layer_idx: int = 0) -> int:
    """Return the head width of a layer of the dense model of a stock or a pruned config."""
    values = _dense_values(config, layer_idx)
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


def rotary_dim(config: PretrainedConfig, layer_idx: int = 0) -> int:
    """Return how many channels of a dense head are rotated, in a layer that rotates them at all.

    Raises:
        ValueError: there are none, or more than a head has.
    """
    values = vars(config)
    rope = values.get("rope_parameters") or {}
    layer_types = values.get("layer_types") or ()
    if layer_types and layer_types[layer_idx] in rope:
        rope = rope[layer_types[layer_idx]]
    head_dim, share = dense_head_dim(config, layer_idx), rope.get("partial_rotary_factor", 1.0)
    dim = int(head_dim * share)
    if not 1 < dim <= head_dim:
        raise ValueError(f"partial_rotary_factor = {share!r} rotates {dim} of the {head_dim} channels of a head")
    return dim


def rotated(config: PretrainedConfig, spec: FamilySpec, layer_idx: int) -> bool:
    """Return whether a layer rotates query and key.

    Args:
        config: stock or pruned config.
        spec: its family.
        layer_idx: number of the layer.
    """
    if isinstance(spec.rope, bool):
        return spec.rope
    values = vars(config)
    if spec.rope == "sliding_window":
        return values["sliding_window"] is None or values["layer_types"][layer_idx] == "sliding_attention"
    return bool(values[spec.rope][layer_idx])


def dense_shape(config: PretrainedConfig, spec: FamilySpec, layer_idx: int = 0) -> LayerShape:
    """Return the shape of a layer of the dense model.

    Args:
        config: stock or pruned config.
        spec: its family.
        layer_idx: number of the layer; any will do where the dense layers are alike.

    Raises:
        ValueError: the kv heads cannot serve equally many query heads.
    """
    values = _dense_values(config, layer_idx)
    heads = values["num_attention_heads"]
    kv_heads = spec.kv_heads if isinstance(spec.kv_heads, int) else values.get(spec.kv_heads) or heads
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are no multiple of {kv_heads} kv heads")
    head_dim = dense_head_dim(config, layer_idx)
    return LayerShape(
        heads_per_kv=(heads // kv_heads,) * kv_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        intermediate_size=_ffn_width(values, spec),
    )


def _ffn_width(values: Mapping[str, Any], spec: FamilySpec) -> int:
    if values[spec.intermediate_size] is None and spec.ffn_ratio is not None:
        return spec.ffn_ratio * values["hidden_size"]
    return values[spec.intermediate_size]


def dense_shapes(config: PretrainedConfig, spec: FamilySpec) -> tuple[LayerShape, ...]:
    """Return the shapes of all layers of the dense model of a stock or a pruned config."""
    return tuple(dense_shape(config, spec, layer_idx) for layer_idx in range(config.num_hidden_layers))


@contextmanager
def dense_sizes(config: PretrainedConfig) -> Iterator[None]:
    """Let stock code read the dense sizes of a config, which raises while there are pruned values per layer.

    Sizes per layer that the dense model itself has are what it reads then.
    """
    per_layer = config.to_dict().get("per_layer_config")
    setattr(config, "per_layer_config", _dense_overrides(config))  # noqa: B010 - stock code annotates other keys
    try:
        yield
    finally:
        config.per_layer_config = per_layer


_SIZES = ("qk_head_dim", "v_head_dim", "intermediate_size")
_SWITCHES = ("output_bias", "shortcuts", "headed_qk_norm")
_BLOCKS = ("attention", "ffn")


def check_record(record: Any, config: PretrainedConfig, spec: FamilySpec) -> None:
    """Check what config.json says of a pruned model: nobody knows who has written it.

    Args:
        record: its field `intraslice`.
        config: the config it stands in, with the dense sizes.
        spec: its family.

    Raises:
        ValueError: a field is missing, unknown, of another type, or a shape is no smaller layer of this family.
    """
    for name, kind in (("family", str), ("method", str), ("recipe", dict), ("layers", list)):
        if not isinstance(record.get(name), kind):
            raise ValueError(f"intraslice.{name} of config.json is missing, or is no {_WORDS[kind]}.")
    if record["family"] != spec.name:
        raise ValueError(f"intraslice.family of config.json is {record['family']!r}, but the model is {spec.name}.")
    if not isinstance(record.get("dense", {}), dict):
        raise ValueError("intraslice.dense of config.json is no object.")
    layers, count = record["layers"], config.num_hidden_layers
    if len(layers) != count:
        raise ValueError(f"config.json has shapes of {len(layers)} layers, but {count} layers.")
    for layer_idx, shape in enumerate(layers):
        wrong = _wrong_types(shape) or _wrong_shape(LayerShape.from_dict(shape), config, spec, layer_idx)
        if wrong:
            raise ValueError(f"layer {layer_idx} of intraslice.layers in config.json {wrong}.")


_WORDS = {str: "text", dict: "object", list: "list"}


def _wrong_types(shape: Any) -> str:
    """Return what is wrong with the fields of a shape, to stand behind its name; "" when they can be read."""
    if not isinstance(shape, dict):
        return "is no object"
    needed = {"heads_per_kv", *_SIZES}
    unknown = sorted(map(str, shape.keys() - needed - {*_SWITCHES, "ranks", "dropped", "output_size"}))
    if unknown or needed - shape.keys():
        return f"has the unknown field {unknown[0]!r}" if unknown else f"has no {min(needed - shape.keys())}"
    groups, ranks, dropped = shape["heads_per_kv"], shape.get("ranks", []), shape.get("dropped", [])
    if not isinstance(groups, list) or not all(type(heads) is int and heads > 0 for heads in groups):
        return f"has heads_per_kv = {str(groups)[:80]}, which is no list of whole numbers above 0"
    for name in (*_SIZES, "output_size"):
        size = shape.get(name, 0)
        if type(size) is not int or size < 0:
            return f"has {name} = {str(size)[:80]}, which is no whole number from 0"
    for name in _SWITCHES:
        if type(shape.get(name, False)) is not bool:
            return f"has {name} = {str(shape[name])[:80]}, which is neither true nor false"
    if (
        not isinstance(dropped, list)
        or not all(block in _BLOCKS for block in dropped)
        or len({*dropped}) < len(dropped)
    ):
        return f"has dropped = {str(dropped)[:80]}, which is no list of blocks"
    if not isinstance(ranks, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int
        for pair in ranks
    ):
        return "has ranks that are no list of names with whole numbers"
    return ""


def _wrong_shape(shape: LayerShape, config: PretrainedConfig, spec: FamilySpec, layer_idx: int) -> str:
    """Return why a shape is no smaller layer of a family, to stand behind its name; "" when it is one."""
    dense = dense_shape(config, spec, layer_idx)
    sizes = {
        "query heads": (shape.num_attention_heads, dense.num_attention_heads, shape.has_attention),
        "kv heads": (shape.num_key_value_heads, dense.num_key_value_heads, shape.has_attention),
        "channels of query and key": (shape.qk_head_dim, dense.qk_head_dim, shape.has_attention),
        "channels of the value": (shape.v_head_dim, dense.v_head_dim, shape.has_attention),
        "FFN channels": (shape.intermediate_size, dense.intermediate_size, shape.has_ffn),
    }
    for name, (size, largest, kept) in sizes.items():
        low, high = (1, largest) if kept else (0, 0)
        if not low <= size <= high:
            return f"has {size} {name}, and there are {low} to {high}"
    if shape.has_attention and rotated(config, spec, layer_idx) and shape.qk_head_dim % 2:
        return f"has {shape.qk_head_dim} channels of query and key, which are rotated in pairs"
    values = config_values(config)
    ends_sliced = shape.shortcuts and layer_idx == values["num_hidden_layers"] - 1
    if shape.output_size and not (ends_sliced and shape.output_size >= values["hidden_size"]):
        return f"has output_size = {shape.output_size}, which only the end of a sliced stream has"
    linears = spec.linear_sizes(shape, values["hidden_size"])
    for path, rank in shape.ranks:
        if path not in linears or not 1 <= rank <= min(linears[path]):
            return f"has two factors of rank {rank} for {path!r}, which it cannot have"
    return ""


if TYPE_CHECKING:
    _ConfigBase = PretrainedConfig
else:
    _ConfigBase = object


class _PrunedConfig(_ConfigBase):
    """What the configs of all families add to the stock class.

    The global sizes are those of the dense model. `per_layer_config` holds the sizes that caches and serving
    engines read, `intraslice` the exact shapes and where they came from.
    """

    family: ClassVar[str]
    num_hidden_layers: int
    intraslice: dict[str, Any] | None
    _auto_class = "AutoConfig"
    # Splitting heads over devices would need equal groups.
    base_model_tp_plan = None

    @property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Shape of every layer; dense when the config says nothing."""
        if self.intraslice is None:
            return dense_shapes(self, family_of(self))
        return tuple(LayerShape.from_dict(layer) for layer in self.intraslice["layers"])

    def validate_architecture(self) -> None:
        """Check that there is a shape for each layer, in a format that is not newer than this code, and possible.

        Raises:
            ValueError: when there is not; it says which layer is wrong.
        """
        if self.intraslice is None:
            return
        version = self.intraslice.get("format_version")
        # bool is an int too.
        if type(version) is not int or version < 1:
            raise ValueError(f"config.json has the format_version {version!r}, which is not a whole number from 1.")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"format version {version} of this checkpoint is newer than version {FORMAT_VERSION}, the newest that "
                "this code reads; install a newer release of intraslice."
            )
        check_record(self.intraslice, self, family_of(self))

    def check_vllm(self, tensor_parallel_size: int) -> None:
        """Refuse what vLLM would run with wrong results or stop at without saying why.

        Raises:
            ValueError: for groups of different sizes in one layer, or a layer split over devices.
        """
        for layer_idx, shape in enumerate(self.layer_shapes):
            if shape.ranks or shape.shortcuts:
                what = "two factors per weight" if shape.ranks else "matrices on the residual connections"
                raise ValueError(f"vLLM cannot run {what} (layer {layer_idx}); prune with `--target vllm`.")
            if len(set(shape.heads_per_kv)) > 1:
                raise ValueError(
                    f"vLLM needs equally many query heads for all kv heads of a layer, but layer {layer_idx} has "
                    f"{', '.join(map(str, shape.heads_per_kv))}; prune with `--target vllm`."
                )
        if tensor_parallel_size > 1:
            raise ValueError(
                f"vLLM cannot split pruned layers over {tensor_parallel_size} devices; set tensor_parallel_size=1, or "
                "prune with `--target stock` and export with `--to stock`."
            )

    def validate_rope(self) -> None:
        """Check the RoPE settings against the dense head."""
        with dense_sizes(self):
            super().validate_rope()

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what config.json holds: also the RoPE keys that older readers know."""
        rope = vars(self).get("rope_parameters")
        if not rope or "rope_theta" not in rope:
            # Parameters per layer type never had an older form.
            return super().to_diff_dict()
        # Without rope_theta, older readers silently take the default angles.
        scaled = rope.get("rope_type", "default") != "default"
        return {
            **super().to_diff_dict(),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": dict(rope) if scaled else None,
        }


def known_families() -> tuple[str, ...]:
    """Return the families of the table that the installed transformers has."""
    return tuple(family for family in FAMILIES if family in CONFIG_MAPPING_NAMES)


def class_stem(family: str) -> str:
    """Return what the class names of a family begin with in transformers, for example "Llama"."""
    return CONFIG_MAPPING_NAMES[family].removesuffix("Config")


def stock_config_class(family: str) -> type[Any]:
    """Return the stock config class of a family; nothing of other families is imported."""
    return CONFIG_MAPPING[family]


@cache
def config_class(family: str) -> type[Any]:
    """Return the config class of pruned models of a family, for example `IntraSliceLlamaConfig`."""
    stem, stock = class_stem(family), stock_config_class(family)
    name = f"{PREFIX}{stem}Config"
    fields: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{stem} whose layers have their own shapes.",
        "__annotations__": {"intraslice": dict | None},
        "intraslice": None,
        "model_type": f"{MODEL_TYPE_PREFIX}{family}",
        "family": family,
    }
    if _computes(stock, "head_dim"):
        # Narrower heads have a width that does not follow from their number.
        fields["__annotations__"]["head_dim"] = int | None
        fields["head_dim"] = None
    return strict(type(name, (_PrunedConfig, stock), fields))


def _computes(stock: type[Any], name: str) -> bool:
    """Return whether a stock config class computes an attribute, so that nobody can set it."""
    found = getattr(stock, name, None)
    return isinstance(found, property) and found.fset is None


def known_composites() -> tuple[str, ...]:
    """Return the composite model types of the table that the installed transformers has, each once."""
    types = dict.fromkeys(composite for family in known_families() for composite in FAMILIES[family].text_of)
    return tuple(composite for composite in types if composite in CONFIG_MAPPING_NAMES)


class _CompositeConfig(_ConfigBase):
    """What the configs of all composite models add to the stock class: the text tower is a pruned model."""

    text_config: Any
    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        # The stock class would look the text tower up among the registered configs, where it need not be.
        if isinstance(self.text_config, dict):
            family = self.text_config["model_type"].removeprefix(MODEL_TYPE_PREFIX)
            self.text_config = config_class(family)(**self.text_config)
        super().__post_init__(**kwargs)


@cache
def composite_config_class(composite: str) -> type[Any]:
    """Return the config class of a composite whose text tower is pruned, for example `IntraSliceMistral3Config`."""
    stem = class_stem(composite)
    name = f"{PREFIX}{stem}Config"
    fields = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{stem} whose text tower has layers with their own shapes.",
        "model_type": f"{MODEL_TYPE_PREFIX}{composite}",
        "composite": composite,
    }
    return strict(type(name, (_CompositeConfig, stock_config_class(composite)), fields))


_KINDS = ("Config", "Model", "Decoder", "ForCausalLM")
_COMPOSITE_KINDS = ("Config", "Model", "ForConditionalGeneration")


def family_of_class(name: str) -> tuple[str, str]:
    """Take the name of one of our classes apart.

    Returns:
        The family or the composite model type, and what stands behind the stem, for example "ForCausalLM".

    Raises:
        AttributeError: no class has that name here; checkpoints name their classes, so it says what is missing.
    """
    for names, kinds in ((known_families(), _KINDS), (known_composites(), _COMPOSITE_KINDS)):
        for model_type in names:
            stem = PREFIX + class_stem(model_type)
            rest = name.removeprefix(stem)
            if rest in kinds and name == stem + rest:
                return model_type, rest
    unknown = {family: FAMILIES[family].since for family in FAMILIES if family not in CONFIG_MAPPING_NAMES}
    needed = "".join(f"; {family} needs transformers {since} or later" for family, since in unknown.items())
    raise AttributeError(f"{__name__} has no class {name!r} with transformers {transformers.__version__}{needed}")


def __getattr__(name: str) -> Any:
    # Checkpoints and pickles name the classes; one is made when it is asked for.
    model_type, rest = family_of_class(name)
    if rest != "Config":
        raise AttributeError(f"{__name__} has no class {name!r}")
    return config_class(model_type) if model_type in FAMILIES else composite_config_class(model_type)


# What belongs to one class or one file, not to the model.
_NOT_CARRIED_OVER = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "per_layer_config",
    "intraslice",
    "quantization_config",
    "_name_or_path",
)


def _carried_over(config: PretrainedConfig) -> dict[str, Any]:
    # to_dict() has the dense sizes also when there are values per layer.
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_CARRIED_OVER}
    return {**values, "attn_implementation": config._attn_implementation}


def dense_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a pruned config as the stock class, with the dense sizes."""
    family = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    stock = stock_config_class(family)
    values = {**_carried_over(config), **((vars(config)["intraslice"] or {}).get("dense", {}))}
    values = {name: value for name, value in values.items() if not _computes(stock, name)}
    # Of some text towers transformers has no such class, see `causal_lm_class`.
    head = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family, f"{class_stem(family)}ForCausalLM")
    return stock(**values, architectures=[head])


def class_names(pruned: type[Any]) -> dict[str, Any]:
    """Return the fields of config.json that name the classes of a model whose config is of this class of ours."""
    name = pruned.__name__.removesuffix("Config")
    auto, head = (
        ("AutoModelForImageTextToText", "ForConditionalGeneration")
        if issubclass(pruned, _CompositeConfig)
        else ("AutoModelForCausalLM", "ForCausalLM")
    )
    return {
        "architectures": [f"{name}{head}"],
        "auto_map": {
            "AutoConfig": f"configuration_intraslice.{name}Config",
            "AutoModel": f"modeling_intraslice.{name}Model",
            auto: f"modeling_intraslice.{name}{head}",
        },
    }


def pruned_config(
    dense: PretrainedConfig,
    spec: FamilySpec,
    shapes: Sequence[LayerShape],
    *,
    method: str,
    recipe: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """Return the config of a pruned model.

    Args:
        dense: stock config of the dense model.
        spec: its family.
        shapes: of every layer.
        method: name, for the record.
        recipe: all settings as JSON types, for the record.
        changes: fields that are not those of the dense model, for a residual stream of another width.

    Returns:
        The IntraSlice config of the family, complete for config.json.
    """
    pruned = config_class(spec.name)
    # Engines with one width for keys and values must take the larger one.
    widths = [max(shape.qk_head_dim, shape.v_head_dim) for shape in shapes]
    # Where there is no attention, engines lay out a cache all the same: one head, of a width that they can run.
    spare = min(filter(None, widths), default=dense_head_dim(dense))
    per_layer = {
        layer_idx: {
            "num_attention_heads": shape.num_attention_heads or 1,
            "num_key_value_heads": shape.num_key_value_heads or 1,
            "head_dim": widths[layer_idx] or spare,
            spec.intermediate_size: shape.intermediate_size,
        }
        for layer_idx, shape in enumerate(shapes)
    }
    values = _carried_over(dense)
    if "num_kv_heads" in values:
        # Engines that find this name in a config prefer it.
        for sizes in per_layer.values():
            sizes["num_kv_heads"] = sizes["num_key_value_heads"]
    changes = dict(changes or {})
    restored = {name: values.get(name) for name in changes}
    own = _dense_overrides(dense)
    if own is not None:
        restored["per_layer_config"] = own
    return pruned(
        **{**values, **changes, **class_names(pruned)},
        per_layer_config=per_layer,
        intraslice={
            "format_version": FORMAT_VERSION,
            "family": spec.name,
            "method": method,
            "recipe": dict(recipe),
            "layers": [shape.to_dict() for shape in shapes],
            # What `dense_config` puts back.
            **({"dense": restored} if restored else {}),
        },
    )


def composite_config(composite: PretrainedConfig, text: PretrainedConfig) -> PretrainedConfig:
    """Return the config of a composite whose text tower is pruned.

    Args:
        composite: stock config of the dense composite.
        text: `pruned_config` of its text tower.

    Returns:
        The IntraSlice config of the composite, complete for config.json.
    """
    pruned = composite_config_class(composite.model_type)
    # The classes are named once, on the outside.
    text = copy.deepcopy(text)
    text.architectures = None
    delattr(text, "auto_map")
    return pruned(**{**_carried_over(composite), "text_config": text, **class_names(pruned)})
