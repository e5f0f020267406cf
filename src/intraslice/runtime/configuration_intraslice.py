"""Shapes, families and configs of pruned models.

This file travels with every pruned checkpoint (`trust_remote_code=True`), so it may import only the standard
library, torch, transformers and huggingface_hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, OPTConfig, Phi3Config, PretrainedConfig, Qwen2Config

MIN_TRANSFORMERS = "5.16"
"""The oldest release that knows sizes per layer; older ones would fail later, and say less."""
if [int(part) for part in transformers.__version__.split(".")[:2]] < [
    int(part) for part in MIN_TRANSFORMERS.split(".")
]:
    raise ImportError(
        f"a pruned checkpoint needs transformers {MIN_TRANSFORMERS} or later, {transformers.__version__} is installed; "
        "upgrade it, or export the checkpoint with `intraslice export --to stock` or `--to padded`."
    )

FORMAT_VERSION = 1
# Fields of a shape that config.json holds only where they are set.
_OPTIONAL = ("output_bias", "ranks", "shortcuts")


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one decoder layer looks like.

    Attributes:
        heads_per_kv: number of query heads of each kv head; its length is num_key_value_heads, its sum
            num_attention_heads; entries may differ (ragged groups).
        qk_head_dim: width of a query/key head (even when the family has RoPE).
        v_head_dim: width of a value head, and of a head's part of the context.
        intermediate_size: FFN channels.
        output_bias: o_proj and down_proj have biases, also where the family has none.
        ranks: (path, rank) of the Linears, named relative to the layer, that are stored as two factors.
        shortcuts: whether each residual connection passes through a matrix (a rotated and sliced residual stream).
    """

    heads_per_kv: tuple[int, ...]
    qk_head_dim: int
    v_head_dim: int
    intermediate_size: int
    output_bias: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    shortcuts: bool = False

    @property
    def num_attention_heads(self) -> int:
        """Number of query heads."""
        return sum(self.heads_per_kv)

    @property
    def num_key_value_heads(self) -> int:
        """Number of key/value heads."""
        return len(self.heads_per_kv)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; fields that few methods use only where they say something."""
        data = {**asdict(self), "heads_per_kv": list(self.heads_per_kv), "ranks": [list(pair) for pair in self.ranks]}
        return {name: value for name, value in data.items() if value or name not in _OPTIONAL}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerShape:
        """Inverse of `to_dict`."""
        ranks = tuple((path, rank) for path, rank in data.get("ranks", ()))
        return cls(**{**data, "heads_per_kv": tuple(data["heads_per_kv"]), "ranks": ranks})


@dataclass(frozen=True)
class Slot:
    """Where one matrix lives inside a block: a Linear, or one part of a fused Linear.

    Attributes:
        path: name of the Linear relative to the block.
        part: which part of a fused Linear, in the order of its rows.
        parts: names of all parts when fused, for example ("q", "k", "v"); empty when not fused.
    """

    path: str
    part: int = 0
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """Where things are in one Hugging Face layout. Data only.

    Attributes:
        name: the Hugging Face model_type.
        layers: path of the decoder layers in the ForCausalLM class.
        attention: attention module relative to the layer.
        q, k, v, o: projections relative to the attention module.
        mlp: FFN module relative to the layer; "" when its Linears sit on the layer itself.
        up, gate, down: FFN projections relative to the FFN module; gate is None when the FFN is not gated.
        activation: config attribute that names the activation function.
        attention_norm, ffn_norm: norms relative to the layer.
        norm_first: config attribute that says whether norms come before the block; None means always before.
        rope: whether query and key are rotated.
        intermediate_size: config attribute of the FFN width.
        sliding_window: config attribute passed on to the attention kernel, or None.
        qkv_bias, o_bias: whether the projections have biases: a constant, or a config attribute.
    """

    name: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    q: Slot = Slot("q_proj")
    k: Slot = Slot("k_proj")
    v: Slot = Slot("v_proj")
    o: Slot = Slot("o_proj")
    mlp: str = "mlp"
    up: Slot = Slot("up_proj")
    gate: Slot | None = Slot("gate_proj")
    down: Slot = Slot("down_proj")
    activation: str = "hidden_act"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    norm_first: str | None = None
    rope: bool = True
    intermediate_size: str = "intermediate_size"
    sliding_window: str | None = None
    qkv_bias: bool | str = False
    o_bias: bool | str = False

    @property
    def num_ffn_matrices(self) -> int:
        """Number of FFN matrices; a channel costs hidden_size weights in each."""
        return 2 if self.gate is None else 3

    @property
    def attention_paths(self) -> tuple[tuple[str, ...], str]:
        """Linears that read the input of the attention block, and the one that writes its output, within the layer."""
        reading = dict.fromkeys(f"{self.attention}.{slot.path}" for slot in (self.q, self.k, self.v))
        return tuple(reading), f"{self.attention}.{self.o.path}"

    @property
    def ffn_paths(self) -> tuple[tuple[str, ...], str]:
        """Linears that read the input of the FFN, and the one that writes its output, within the layer."""
        prefix = f"{self.mlp}." if self.mlp else ""
        reading = dict.fromkeys(f"{prefix}{slot.path}" for slot in (self.gate, self.up) if slot is not None)
        return tuple(reading), f"{prefix}{self.down.path}"

    def linear_sizes(self, shape: LayerShape, hidden_size: int) -> dict[str, tuple[int, int]]:
        """Return (out, in) of each Linear of a layer of this shape, by its path within the layer."""
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        (attention, o), (ffn, down) = self.attention_paths, self.ffn_paths
        reading = {
            attention: (heads * shape.qk_head_dim, kv_heads * shape.qk_head_dim, kv_heads * shape.v_head_dim),
            ffn: (shape.intermediate_size,) * (self.num_ffn_matrices - 1),
        }
        sizes: dict[str, tuple[int, int]] = {}
        for paths, rows in reading.items():
            # A fused Linear holds the rows of all parts.
            counts = rows if len(paths) == len(rows) else (sum(rows),)
            sizes |= {path: (count, hidden_size) for path, count in zip(paths, counts, strict=True)}
        sizes[o] = (hidden_size, heads * shape.v_head_dim)
        sizes[down] = (hidden_size, shape.intermediate_size)
        return sizes

    def num_parameters(self, shape: LayerShape, hidden_size: int) -> int:
        """Return the number of linear weights (no biases, no norms) of a layer of this shape.

        Args:
            shape: of the layer.
            hidden_size: width of its residual stream.
        """
        ranks = dict(shape.ranks)
        linears = sum(
            ranks[path] * (rows + columns) if path in ranks else rows * columns
            for path, (rows, columns) in self.linear_sizes(shape, hidden_size).items()
        )
        return linears + (2 * hidden_size**2 if shape.shortcuts else 0)


FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec
    for spec in (
        FamilySpec(name="llama", qkv_bias="attention_bias", o_bias="attention_bias"),
        FamilySpec(name="mistral", sliding_window="sliding_window"),
        FamilySpec(name="qwen2", sliding_window="sliding_window", qkv_bias=True),
        FamilySpec(
            name="phi3",
            q=Slot("qkv_proj", 0, ("q", "k", "v")),
            k=Slot("qkv_proj", 1, ("q", "k", "v")),
            v=Slot("qkv_proj", 2, ("q", "k", "v")),
            gate=Slot("gate_up_proj", 0, ("gate", "up")),
            up=Slot("gate_up_proj", 1, ("gate", "up")),
            sliding_window="sliding_window",
        ),
        FamilySpec(
            name="opt",
            layers="model.decoder.layers",
            o=Slot("out_proj"),
            mlp="",
            up=Slot("fc1"),
            gate=None,
            down=Slot("fc2"),
            activation="activation_function",
            attention_norm="self_attn_layer_norm",
            ffn_norm="final_layer_norm",
            norm_first="do_layer_norm_before",
            rope=False,
            intermediate_size="ffn_dim",
            qkv_bias="enable_bias",
            o_bias="enable_bias",
        ),
    )
}


def dense_head_dim(config: PretrainedConfig) -> int:
    """Return the head width of the dense model of a stock or a pruned config."""
    # vars(): reading an overridden attribute of a config with per-layer values raises.
    values = vars(config)
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


def rotary_dim(config: PretrainedConfig) -> int:
    """Return how many channels of a dense head are rotated."""
    rope = vars(config).get("rope_parameters") or {}
    return int(dense_head_dim(config) * rope.get("partial_rotary_factor", 1.0))


def dense_shape(config: PretrainedConfig, spec: FamilySpec) -> LayerShape:
    """Return the shape of every layer of the dense model of a stock or a pruned config."""
    values = vars(config)
    heads = values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    head_dim = dense_head_dim(config)
    return LayerShape(
        heads_per_kv=(heads // kv_heads,) * kv_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        intermediate_size=values[spec.intermediate_size],
    )


@contextmanager
def dense_sizes(config: PretrainedConfig) -> Iterator[None]:
    """Let stock code read the dense sizes of a config, which raises while there are values per layer."""
    per_layer = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = per_layer


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
            return (dense_shape(self, FAMILIES[self.family]),) * self.num_hidden_layers
        return tuple(LayerShape.from_dict(layer) for layer in self.intraslice["layers"])

    def validate_architecture(self) -> None:
        """Check that there is a shape for each layer, in a format that this code knows.

        Raises:
            ValueError: when there is not.
        """
        if self.intraslice is None:
            return
        version = self.intraslice.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format version {version}, this code reads version {FORMAT_VERSION}; "
                "install a matching release of intraslice."
            )
        layers = len(self.intraslice["layers"])
        if layers != self.num_hidden_layers:
            raise ValueError(f"config.json has shapes of {layers} layers, but {self.num_hidden_layers} layers.")

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
        if not rope:
            return super().to_diff_dict()
        # Without rope_theta, older readers silently take the default angles.
        scaled = rope.get("rope_type", "default") != "default"
        return {
            **super().to_diff_dict(),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": dict(rope) if scaled else None,
        }


@strict
class IntraSliceLlamaConfig(_PrunedConfig, LlamaConfig):
    """Llama whose layers have their own shapes."""

    model_type = "intraslice_llama"
    family = "llama"
    intraslice: dict | None = None


@strict
class IntraSliceMistralConfig(_PrunedConfig, MistralConfig):
    """Mistral whose layers have their own shapes."""

    model_type = "intraslice_mistral"
    family = "mistral"
    intraslice: dict | None = None


@strict
class IntraSliceQwen2Config(_PrunedConfig, Qwen2Config):
    """Qwen2 whose layers have their own shapes."""

    model_type = "intraslice_qwen2"
    family = "qwen2"
    intraslice: dict | None = None


@strict
class IntraSlicePhi3Config(_PrunedConfig, Phi3Config):
    """Phi3 whose layers have their own shapes."""

    model_type = "intraslice_phi3"
    family = "phi3"
    intraslice: dict | None = None


@strict
class IntraSliceOPTConfig(_PrunedConfig, OPTConfig):
    """OPT whose layers have their own shapes."""

    model_type = "intraslice_opt"
    family = "opt"
    intraslice: dict | None = None


_DENSE_CONFIGS = {
    "llama": (LlamaConfig, IntraSliceLlamaConfig),
    "mistral": (MistralConfig, IntraSliceMistralConfig),
    "qwen2": (Qwen2Config, IntraSliceQwen2Config),
    "phi3": (Phi3Config, IntraSlicePhi3Config),
    "opt": (OPTConfig, IntraSliceOPTConfig),
}
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
    family = config.model_type.removeprefix("intraslice_")
    stock, _ = _DENSE_CONFIGS[family]
    values = {**_carried_over(config), **((vars(config)["intraslice"] or {}).get("dense", {}))}
    return stock(**values, architectures=[stock.__name__.replace("Config", "ForCausalLM")])


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
    _, pruned = _DENSE_CONFIGS[spec.name]
    name = pruned.__name__.removesuffix("Config")
    per_layer = {
        layer_idx: {
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            # Engines with one width for keys and values must take the larger one.
            "head_dim": max(shape.qk_head_dim, shape.v_head_dim),
            spec.intermediate_size: shape.intermediate_size,
        }
        for layer_idx, shape in enumerate(shapes)
    }
    values = _carried_over(dense)
    changes = dict(changes or {})
    return pruned(
        **{**values, **changes},
        architectures=[f"{name}ForCausalLM"],
        auto_map={
            "AutoConfig": f"configuration_intraslice.{pruned.__name__}",
            "AutoModel": f"modeling_intraslice.{name}Model",
            "AutoModelForCausalLM": f"modeling_intraslice.{name}ForCausalLM",
        },
        per_layer_config=per_layer,
        intraslice={
            "format_version": FORMAT_VERSION,
            "family": spec.name,
            "method": method,
            "recipe": dict(recipe),
            "layers": [shape.to_dict() for shape in shapes],
            # What `dense_config` puts back.
            **({"dense": {name: values.get(name) for name in changes}} if changes else {}),
        },
    )
