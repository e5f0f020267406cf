"""Shapes of layers, and the families of decoders as data: where things are, and what is special about them.

A family of known features is one row of `FAMILIES`. What the stock module that is replaced knows itself (softmax
scale, window, dropout, cap of the scores) is taken from it and stands in no row.

Rows for later features have room here: what differs from layer to layer is a function of the layer index
(`LayerShape` is one layer's).

This file travels with every pruned checkpoint (`trust_remote_code=True`) and is read by code that must not wait for
torch, so it imports only the standard library.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

# Fields of a shape that config.json holds only where they are set.
_OPTIONAL = ("output_bias", "ranks", "shortcuts", "headed_qk_norm", "dropped", "output_size")


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
        headed_qk_norm: whether the norms of query and key, where all heads share one weight in the dense model, have
            one weight per head: [num_attention_heads, qk_head_dim] and [num_key_value_heads, qk_head_dim].
        dropped: blocks that the layer does not have, "attention" or "ffn"; their heads, widths and channels are 0.
        output_size: width of the residual stream behind the layer where that is another one than before it, as behind
            the last layer of a sliced stream; 0 where it is the same.
    """

    heads_per_kv: tuple[int, ...]
    qk_head_dim: int
    v_head_dim: int
    intermediate_size: int
    output_bias: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    shortcuts: bool = False
    headed_qk_norm: bool = False
    dropped: tuple[str, ...] = ()
    output_size: int = 0

    @property
    def has_attention(self) -> bool:
        """Whether the layer has an attention block."""
        return "attention" not in self.dropped

    @property
    def has_ffn(self) -> bool:
        """Whether the layer has an FFN."""
        return "ffn" not in self.dropped

    def without(self, block: str) -> LayerShape:
        """Return the shape of a layer that has lost a block, "attention" or "ffn"."""
        sizes: dict[str, Any] = {"intermediate_size": 0}
        if block == "attention":
            sizes = {"heads_per_kv": (), "qk_head_dim": 0, "v_head_dim": 0}
        return replace(self, **sizes, dropped=(*self.dropped, block))

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
        data["dropped"] = list(self.dropped)
        return {name: value for name, value in data.items() if value or name not in _OPTIONAL}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerShape:
        """Inverse of `to_dict`."""
        ranks = tuple((path, rank) for path, rank in data.get("ranks", ()))
        dropped = tuple(data.get("dropped", ()))
        return cls(**{**data, "heads_per_kv": tuple(data["heads_per_kv"]), "ranks": ranks, "dropped": dropped})


@dataclass(frozen=True)
class Slot:
    """Where one matrix lives inside a site: a Linear, or one part of a fused Linear.

    Attributes:
        path: name of the Linear relative to the module of the site.
        part: which part of a fused Linear, in the order of its rows.
        parts: names of all parts when fused, for example ("q", "k", "v"); empty when not fused.
        grouped: whether the rows of a fused Linear go by kv head: its query heads, its key, its value, then those of
            the next one; otherwise all rows of a part are together.
    """

    path: str
    part: int = 0
    parts: tuple[str, ...] = ()
    grouped: bool = False


def grouped_sizes(shape: LayerShape) -> list[tuple[int, int, int]]:
    """Return how many rows of q, k and v each kv head has in a grouped fused Linear.

    Args:
        shape: of the layer.
    """
    return [(heads * shape.qk_head_dim, shape.qk_head_dim, shape.v_head_dim) for heads in shape.heads_per_kv]


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """Norms of query and key. A stock module without them (a switch of the config) has them off.

    Attributes:
        q, k: modules relative to the attention module.
        over: what one norm is computed over: each "head", or "all" heads of a token together.
        after_rope: whether they come after the rotation.
    """

    q: str = "q_norm"
    k: str = "k_norm"
    over: str = "head"
    after_rope: bool = False


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is different in a family where its config says so.

    Attributes:
        when: config attributes, and the values that all of them must have.
        then: fields of the `FamilySpec`, and their values in such a model.
    """

    when: dict[str, Any]
    then: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    """An architecture of llama.cpp that computes what a family computes, where all layers have one shape.

    A file of it has heads of the dense width with all rotary pairs, and no biases: only the number of heads and the FFN
    are smaller.

    Attributes:
        architecture: its name in GGUF files.
        activations: activation functions that it has, as configs call them.
        windows: whether it knows windows of attention, which all layers have but the last of every so many.
        caps: config attributes of caps that it always computes; those that stand here in no row must be unset.
        head: whether the output matrix is the embedding ("tied"), stands in the file in any case ("own"), or "either".
        fills_hidden: whether heads are hidden_size / heads channels wide, so that no head can go.
        scale_from_hidden: with this number of layers the softmax scale is (hidden_size / heads)^-1/2 instead of
            (head width)^-1/2; None: with no number.
    """

    architecture: str
    activations: tuple[str, ...] = ("silu", "swish")
    windows: bool = False
    caps: tuple[str, ...] = ()
    head: str = "either"
    fills_hidden: bool = False
    scale_from_hidden: int | None = None


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """Where things are in one Hugging Face layout, and what is special about the family. Data only.

    Attributes:
        name: the Hugging Face model_type.
        layers: path of the decoder layers in the ForCausalLM class.
        attention: attention module relative to the layer.
        q, k, v, o: projections relative to the attention module.
        mlp: FFN module relative to the layer; "" when its Linears sit on the layer itself.
        up, gate, down: FFN projections relative to the FFN module; gate is None when the FFN is not gated.
        activation: config attribute that names the activation function.
        act_fn: the activation function as a module relative to the FFN module.
        attention_norm, ffn_norm: norms of the inputs of the sites, relative to the layer; None when a site reads the
            residual stream as it is.
        attention_out_norm, ffn_out_norm: norms of the outputs of the sites, before they are added to the residual
            stream; None when there are none.
        residual_scale: config attribute that the output of each site is multiplied by before it is added.
        query_temperature: whether queries grow with their position, by 1 + beta log(1 + floor(position / length)); beta
            and the length are in the RoPE parameters of the config.
        parallel: whether the FFN reads the input of the layer, as attention does: a constant, or a config attribute.
        qk_norm: norms of query and key; None when the family has none.
        norm: what the norms compute: "rms" (x / rms(x) * weight), "rms_plus_one" (the same, * (1 + weight)), "layer"
            (LayerNorm with weight and bias), "layer_plus_one", or "layer_plain" (LayerNorm without weights).
        norm_first: config attribute that says whether norms come before the site; None means always before.
        rope: whether query and key are rotated: a constant, the config list that says it of each layer (0: not), or
            "sliding_window" where layers with a window are rotated, and all layers if the model has no windows.
        rope_layout: where the two channels of a rotary pair are: "half" (one in each half of the rotated channels), or
            "interleaved" (side by side); "interleaved_tables" when those of the angles are side by side too.
        kv_heads: config attribute of the number of kv heads, as many as query heads where it is not set; or the number.
        intermediate_size: config attribute of the FFN width.
        ffn_ratio: FFN width over hidden_size where that attribute is not set; None where it always is.
        sliding_window: config attribute passed on to the attention kernel, where the stock attention module reads it
            from the config at every call; None when the module holds its window itself, or has none.
        qkv_bias, o_bias: whether the projections have biases: a constant, or a config attribute.
        bias_fields: config attributes that together give every Linear of a layer a bias in the stock class; empty
            when some Linear has no place for one.
        head_dim_field: whether the stock config has a head_dim, so that the stock class can have other heads than
            hidden_size / num_attention_heads.
        rope_subset: whether the stock config can say which of the rotary pairs of a wider head its heads have.
        fixed_scale: whether the stock class takes its softmax scale from another config attribute than the head width.
        heads_divide_hidden: whether the stock config refuses head counts that do not divide hidden_size.
        stand_in: another family that computes the same without that check, and without biases; None if there is none.
        gguf: name of the architecture in GGUF files that transformers reads as this family; None when there is none.
        gguf_interleaved: whether such files store the two channels of a rotary pair side by side.
        starts_with_bos: whether the model is of no use on text that does not begin with the BOS token, so that every
            window of calibration and evaluation has to begin with it.
        transposed: whether the stock class stores the matrices of its layers as [in, out] (Conv1D). In pruned models
            they are Linears.
        variants: what the config switches; where several hold, the later ones go over the earlier ones. See
            `of_config`.
        refuse: config attributes that must be unset, because the computation is another one with them.
        llama_cpp: the architecture of llama.cpp for models whose layers have one shape; None where there is none, or
            where `llama_cpp_lacks` is empty: then an architecture with a shape per layer is used.
        renames: (beginning of a name on disk, what stands there in the state dict of the ForCausalLM class), for
            checkpoints whose names are others, for example ("model.language_model.", "model.") or ("embed_out.",
            "lm_head."). Plain text, no patterns; the first pair that fits is taken, once; names that the state dict
            has are left alone.
        head_of: another family whose causal language model is put around this decoder, where transformers has no such
            class because the decoder is only used inside of composites; None where transformers has one.
        text_of: model_types of the composite checkpoints (with vision towers, for example) whose text tower is of
            this family.
        since: first release of transformers that this was tested with.
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
    act_fn: str = "act_fn"
    attention_norm: str | None = "input_layernorm"
    ffn_norm: str | None = "post_attention_layernorm"
    attention_out_norm: str | None = None
    ffn_out_norm: str | None = None
    residual_scale: str | None = None
    parallel: bool | str = False
    qk_norm: QKNorm | None = None
    query_temperature: bool = False
    norm: str = "rms"
    norm_first: str | None = None
    rope: bool | str = True
    rope_layout: str = "half"
    kv_heads: str | int = "num_key_value_heads"
    intermediate_size: str = "intermediate_size"
    ffn_ratio: int | None = None
    sliding_window: str | None = None
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    bias_fields: tuple[str, ...] = ()
    head_dim_field: bool = True
    rope_subset: bool = True
    fixed_scale: bool = False
    heads_divide_hidden: bool = False
    stand_in: str | None = None
    gguf: str | None = None
    gguf_interleaved: bool = False
    starts_with_bos: bool = False
    transposed: bool = False
    variants: tuple[Variant, ...] = ()
    refuse: tuple[str, ...] = ()
    llama_cpp: LlamaCpp | None = None
    renames: tuple[tuple[str, str], ...] = ()
    head_of: str | None = None
    text_of: tuple[str, ...] = ()
    since: str = "5.16"

    def of_config(self, config: Any) -> FamilySpec:
        """Return this row with what a config of the family switches.

        Args:
            config: stock or pruned config.
        """
        changes: dict[str, Any] = {}
        for variant in self.variants:
            if all(getattr(config, name) == value for name, value in variant.when.items()):
                changes |= variant.then
        return replace(self, **changes) if changes else self

    def state_name(self, name: str) -> str:
        """Return the state-dict name of a tensor that is stored under another name; the same name if no pair fits."""
        for stored, known in self.renames:
            if name.startswith(stored):
                return known + name[len(stored) :]
        return name

    @property
    def rotatable(self) -> bool:
        """Whether the residual stream may be rotated: a rotation passes unchanged only through an RMSNorm whose
        weight can be moved into the Linears that follow, and only where the norms come before the sites.
        """
        reads_norms = self.attention_norm is not None and self.ffn_norm is not None
        plain_sum = self.norm_first is None and self.parallel is False and self.residual_scale is None
        return self.norm == "rms" and reads_norms and plain_sum and not self.output_norms

    @property
    def interleaved(self) -> bool:
        """Whether the two channels of a rotary pair are side by side."""
        return self.rope_layout != "half"

    @property
    def norm_offset(self) -> float:
        """What the norms add to their weight."""
        return 1.0 if self.norm.endswith("_plus_one") else 0.0

    @property
    def output_norms(self) -> bool:
        """Whether the outputs of the blocks are normalized before they are added to the residual stream."""
        return self.attention_out_norm is not None or self.ffn_out_norm is not None

    @property
    def llama_cpp_lacks(self) -> tuple[str, ...]:
        """What a layer has that llama.cpp's architecture with a shape per layer has no place for, in words."""
        has = {
            "norms of query and key": self.qk_norm is not None,
            "norms of outputs": self.output_norms,
            "parallel blocks": self.parallel is not False,
            "a factor on the residual sum": self.residual_scale is not None,
            "interleaved RoPE": self.interleaved,
            "layers without RoPE": self.rope is not True,
            "a temperature of the queries": self.query_temperature,
            "FFNs without gate": self.gate is None,
            "norms other than RMSNorm": self.norm != "rms",
        }
        return tuple(words for words, found in has.items() if found)

    @property
    def without_targets(self) -> dict[str, str]:
        """The runtimes that cannot run a pruned model of this family, by name, and why."""
        reasons = {}
        if self.llama_cpp_lacks and self.llama_cpp is None:
            reasons["llama.cpp"] = (
                f"its architecture with a shape per layer has no {', no '.join(self.llama_cpp_lacks)}"
            )
        elif self.llama_cpp is not None and self.llama_cpp.fills_hidden:
            reasons["llama.cpp"] = (
                f"heads of its architecture {self.llama_cpp.architecture} are hidden_size / heads wide, so that none "
                "can go; export --to gguf fills the heads of any checkpoint up with zeros"
            )
        if not self.head_dim_field:
            reasons["stock"] = "the stock class has no head width of its own, only hidden_size / heads"
        return reasons

    @property
    def class_fields(self) -> tuple[str, ...]:
        """Path from the ForCausalLM class to the module that holds the layers, for example ("model", "decoder")."""
        return tuple(self.layers.split(".")[:-1])

    @property
    def num_ffn_matrices(self) -> int:
        """Number of FFN matrices; a channel costs hidden_size weights in each."""
        return 2 if self.gate is None else 3

    @property
    def attention_paths(self) -> tuple[tuple[str, ...], str]:
        """Linears that read the input of attention, and the one that writes its output, within the layer."""
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
        sizes[down] = (shape.output_size or hidden_size, shape.intermediate_size)
        gone = (() if shape.has_attention else (*attention, o)) + (() if shape.has_ffn else (*ffn, down))
        return {path: size for path, size in sizes.items() if path not in gone}

    def num_parameters(self, shape: LayerShape, hidden_size: int) -> int:
        """Return the number of linear weights (no biases, no norms) of a layer of this shape.

        Args:
            shape: of the layer.
            hidden_size: width of its residual stream; that behind the layer may be another one (`output_size`).
        """
        ranks = dict(shape.ranks)
        linears = sum(
            ranks[path] * (rows + columns) if path in ranks else rows * columns
            for path, (rows, columns) in self.linear_sizes(shape, hidden_size).items()
        )
        return linears + (hidden_size * (hidden_size + (shape.output_size or hidden_size)) if shape.shortcuts else 0)


_QKV = ("q", "k", "v")
_GATE_UP = ("gate", "up")
_GELU_TANH = ("gelu_pytorch_tanh",)

FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec
    for spec in (
        FamilySpec(
            name="llama",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            bias_fields=("attention_bias", "mlp_bias"),
            heads_divide_hidden=True,
            stand_in="mistral",
            gguf="llama",
            gguf_interleaved=True,
        ),
        FamilySpec(name="mistral", sliding_window="sliding_window", text_of=("mistral3",)),
        FamilySpec(name="qwen2", qkv_bias=True, gguf="qwen2"),
        FamilySpec(
            name="phi3",
            q=Slot("qkv_proj", 0, _QKV),
            k=Slot("qkv_proj", 1, _QKV),
            v=Slot("qkv_proj", 2, _QKV),
            gate=Slot("gate_up_proj", 0, _GATE_UP),
            up=Slot("gate_up_proj", 1, _GATE_UP),
            act_fn="activation_fn",
            sliding_window="sliding_window",
            rope_subset=False,
            gguf="phi3",
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
            act_fn="activation_fn",
            attention_norm="self_attn_layer_norm",
            ffn_norm="final_layer_norm",
            norm="layer",
            norm_first="do_layer_norm_before",
            rope=False,
            intermediate_size="ffn_dim",
            qkv_bias="enable_bias",
            o_bias="enable_bias",
            bias_fields=("enable_bias",),
            head_dim_field=False,
        ),
        FamilySpec(
            name="seed_oss",
            qkv_bias="attention_bias",
            o_bias="attention_out_bias",
            bias_fields=("attention_bias", "attention_out_bias", "mlp_bias"),
        ),
        FamilySpec(
            name="starcoder2",
            up=Slot("c_fc"),
            gate=None,
            down=Slot("c_proj"),
            act_fn="act",
            norm="layer",
            sliding_window="sliding_window",
            qkv_bias="use_bias",
            o_bias="use_bias",
            bias_fields=("use_bias",),
            head_dim_field=False,
        ),
        FamilySpec(
            name="arcee",
            gate=None,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            bias_fields=("attention_bias", "mlp_bias"),
            heads_divide_hidden=True,
        ),
        FamilySpec(name="cwm", heads_divide_hidden=True),
        FamilySpec(name="ministral"),
        FamilySpec(
            name="ministral3",
            query_temperature=True,
            rope_subset=False,
            sliding_window="sliding_window",
            text_of=("mistral3",),
        ),
        FamilySpec(
            name="gemma",
            starts_with_bos=True,
            norm="rms_plus_one",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            refuse=("use_bidirectional_attention",),
            llama_cpp=LlamaCpp(architecture="gemma", activations=_GELU_TANH, head="tied"),
        ),
        FamilySpec(
            name="internlm3",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            bias_fields=("attention_bias", "mlp_bias"),
            heads_divide_hidden=True,
            stand_in="mistral",
            since="5.23",
        ),
        FamilySpec(
            name="jais2",
            gate=None,
            norm="layer",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            bias_fields=("attention_bias", "mlp_bias"),
            heads_divide_hidden=True,
        ),
        FamilySpec(
            name="olmo",
            norm="layer_plain",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            head_dim_field=False,
            refuse=("clip_qkv",),
        ),
        FamilySpec(
            name="stablelm",
            norm="layer",
            qkv_bias="use_qkv_bias",
            head_dim_field=False,
            rope_subset=False,
            refuse=("use_parallel_residual", "qk_layernorm"),
        ),
        FamilySpec(
            name="nemotron",
            gate=None,
            norm="layer_plus_one",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            bias_fields=("attention_bias", "mlp_bias"),
        ),
        FamilySpec(
            name="vaultgemma",
            starts_with_bos=True,
            activation="hidden_activation",
            ffn_norm="pre_feedforward_layernorm",
            norm="rms_plus_one",
            fixed_scale=True,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            heads_divide_hidden=True,
        ),
        FamilySpec(
            name="smollm3",
            rope="no_rope_layers",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            bias_fields=("attention_bias", "mlp_bias"),
        ),
        FamilySpec(
            name="qwen3",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=QKNorm(),
            gguf="qwen3",
            llama_cpp=LlamaCpp(architecture="qwen3"),
        ),
        FamilySpec(
            name="qwen3_vl_text",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=QKNorm(),
            head_of="qwen3",
            text_of=("qwen3_vl",),
            llama_cpp=LlamaCpp(architecture="qwen3"),
        ),
        FamilySpec(
            name="granite",
            residual_scale="residual_multiplier",
            fixed_scale=True,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            bias_fields=("attention_bias", "mlp_bias"),
        ),
        FamilySpec(
            name="gemma2",
            starts_with_bos=True,
            activation="hidden_activation",
            ffn_norm="pre_feedforward_layernorm",
            attention_out_norm="post_attention_layernorm",
            ffn_out_norm="post_feedforward_layernorm",
            norm="rms_plus_one",
            fixed_scale=True,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            gguf="gemma2",
            llama_cpp=LlamaCpp(
                architecture="gemma2",
                activations=_GELU_TANH,
                windows=True,
                caps=("attn_logit_softcapping", "final_logit_softcapping"),
                head="tied",
                scale_from_hidden=46,
            ),
        ),
        FamilySpec(
            name="gemma3_text",
            starts_with_bos=True,
            activation="hidden_activation",
            ffn_norm="pre_feedforward_layernorm",
            attention_out_norm="post_attention_layernorm",
            ffn_out_norm="post_feedforward_layernorm",
            qk_norm=QKNorm(),
            norm="rms_plus_one",
            fixed_scale=True,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            refuse=("use_bidirectional_attention",),
            text_of=("gemma3",),
            gguf="gemma3",
            llama_cpp=LlamaCpp(architecture="gemma3", activations=_GELU_TANH, windows=True, scale_from_hidden=62),
        ),
        FamilySpec(
            name="olmo2",
            attention_norm=None,
            ffn_norm=None,
            attention_out_norm="post_attention_layernorm",
            ffn_out_norm="post_feedforward_layernorm",
            qk_norm=QKNorm(over="all"),
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            head_dim_field=False,
            llama_cpp=LlamaCpp(architecture="olmo2", head="own", fills_hidden=True),
        ),
        FamilySpec(
            name="olmo3",
            attention_norm=None,
            ffn_norm=None,
            attention_out_norm="post_attention_layernorm",
            ffn_out_norm="post_feedforward_layernorm",
            qk_norm=QKNorm(over="all"),
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            head_dim_field=False,
            llama_cpp=LlamaCpp(architecture="olmo2", windows=True, head="own", fills_hidden=True),
        ),
        FamilySpec(
            name="exaone4",
            attention_norm=None,
            ffn_norm=None,
            attention_out_norm="post_attention_layernorm",
            ffn_out_norm="post_feedforward_layernorm",
            qk_norm=QKNorm(),
            rope="sliding_window",
        ),
        FamilySpec(
            name="hunyuan_v1_dense",
            qk_norm=QKNorm(q="query_layernorm", k="key_layernorm", after_rope=True),
            qkv_bias="attention_bias",
            o_bias="attention_bias",
        ),
        FamilySpec(
            name="glm",
            gate=Slot("gate_up_proj", 0, _GATE_UP),
            up=Slot("gate_up_proj", 1, _GATE_UP),
            act_fn="activation_fn",
            rope_layout="interleaved",
            rope_subset=False,
            qkv_bias="attention_bias",
        ),
        FamilySpec(
            name="glm4",
            gate=Slot("gate_up_proj", 0, _GATE_UP),
            up=Slot("gate_up_proj", 1, _GATE_UP),
            act_fn="activation_fn",
            ffn_norm="post_attention_layernorm",
            attention_out_norm="post_self_attn_layernorm",
            ffn_out_norm="post_mlp_layernorm",
            rope_layout="interleaved",
            rope_subset=False,
            qkv_bias="attention_bias",
        ),
        FamilySpec(
            name="ernie4_5",
            rope_layout="interleaved",
            qkv_bias="use_bias",
            o_bias="use_bias",
            bias_fields=("use_bias",),
        ),
        FamilySpec(name="helium", rope_layout="interleaved", qkv_bias="attention_bias"),
        FamilySpec(
            name="cohere2",
            ffn_norm="input_layernorm",
            parallel=True,
            norm="layer",
            rope="sliding_window",
            rope_layout="interleaved_tables",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
        ),
        FamilySpec(
            name="cohere",
            ffn_norm="input_layernorm",
            parallel=True,
            norm="layer",
            rope_layout="interleaved_tables",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            refuse=("use_qk_norm",),
        ),
        FamilySpec(
            name="phi",
            o=Slot("dense"),
            up=Slot("fc1"),
            gate=None,
            down=Slot("fc2"),
            act_fn="activation_fn",
            ffn_norm="input_layernorm",
            parallel=True,
            norm="layer",
            rope_subset=False,
            qkv_bias=True,
            o_bias=True,
            head_dim_field=False,
            refuse=("qk_layernorm",),
        ),
        FamilySpec(
            name="gpt_neox",
            layers="gpt_neox.layers",
            attention="attention",
            q=Slot("query_key_value", 0, _QKV, grouped=True),
            k=Slot("query_key_value", 1, _QKV, grouped=True),
            v=Slot("query_key_value", 2, _QKV, grouped=True),
            o=Slot("dense"),
            up=Slot("dense_h_to_4h"),
            gate=None,
            down=Slot("dense_4h_to_h"),
            act_fn="act",
            parallel="use_parallel_residual",
            norm="layer",
            rope_subset=False,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            bias_fields=("attention_bias",),
            head_dim_field=False,
            renames=(("embed_out.", "lm_head."),),
        ),
        FamilySpec(
            name="falcon",
            layers="transformer.h",
            attention="self_attention",
            q=Slot("query_key_value", 0, _QKV, grouped=True),
            k=Slot("query_key_value", 1, _QKV, grouped=True),
            v=Slot("query_key_value", 2, _QKV, grouped=True),
            o=Slot("dense"),
            up=Slot("dense_h_to_4h"),
            gate=None,
            down=Slot("dense_4h_to_h"),
            activation="activation",
            act_fn="act",
            ffn_norm="input_layernorm",
            parallel=True,
            norm="layer",
            rope_subset=False,
            kv_heads=1,
            intermediate_size="ffn_hidden_size",
            qkv_bias="bias",
            o_bias="bias",
            bias_fields=("bias",),
            head_dim_field=False,
            variants=(
                Variant(when={"multi_query": False}, then={"kv_heads": "num_kv_heads"}),
                Variant(
                    when={"parallel_attn": False}, then={"ffn_norm": "post_attention_layernorm", "parallel": False}
                ),
                Variant(
                    when={"new_decoder_architecture": True},
                    then={"kv_heads": "num_kv_heads", "attention_norm": "ln_attn", "ffn_norm": "ln_mlp"},
                ),
                Variant(
                    when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
                    then={"attention_norm": "input_layernorm", "ffn_norm": "input_layernorm"},
                ),
            ),
            refuse=("alibi",),
        ),
        FamilySpec(
            name="gpt2",
            layers="transformer.h",
            attention="attn",
            q=Slot("c_attn", 0, _QKV),
            k=Slot("c_attn", 1, _QKV),
            v=Slot("c_attn", 2, _QKV),
            o=Slot("c_proj"),
            up=Slot("c_fc"),
            gate=None,
            down=Slot("c_proj"),
            activation="activation_function",
            act_fn="act",
            attention_norm="ln_1",
            ffn_norm="ln_2",
            norm="layer",
            rope=False,
            intermediate_size="n_inner",
            ffn_ratio=4,
            qkv_bias=True,
            o_bias=True,
            head_dim_field=False,
            transposed=True,
            refuse=("add_cross_attention",),
        ),
    )
}
