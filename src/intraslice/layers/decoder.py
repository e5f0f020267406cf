"""One decoder layer taken apart: two residual blocks, and the neutral weights of each.

What a block adds to the residual stream is its raw output (of o_proj or down_proj), normalized where the family has
output norms, times the factor of the family.

Reads modules through their `FamilySpec`; never writes them (see surgery.py).

Shapes: B batch, T time, D hidden_size, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intraslice.layers.sites import ATTENTION, FFN
from intraslice.layers.state_dict import split_attention, split_ffn
from intraslice.layers.weights import AttentionWeights, FFNWeights
from intraslice.runtime.families_intraslice import FamilySpec, LayerShape, Slot
from intraslice.runtime.modeling_intraslice import DroppedAttention, FactoredLinear, PrunedAttention


def norms_come_first(spec: FamilySpec, config: Any) -> bool:
    """Return whether each block normalises its input; otherwise it normalises the sum with the residual stream."""
    return True if spec.norm_first is None else bool(getattr(config, spec.norm_first))


def blocks_are_parallel(spec: FamilySpec, config: Any) -> bool:
    """Return whether the FFN reads the input of the layer, as attention does."""
    return bool(getattr(config, spec.parallel)) if isinstance(spec.parallel, str) else spec.parallel


class DecoderLayer:
    """Runs a decoder layer in pieces: h1 = h + attention(norm(h)), h2 = h1 + ffn(norm(h1)).

    Parallel blocks: h2 = h + attention(norm(h)) + ffn(norm(h)).

    Args:
        module: a Hugging Face decoder layer whose attention is a `PrunedAttention`.
        spec: its family.
        config: the dense config.
        arguments: what the model hands to the layer besides the hidden states: `position_embeddings`, `position_ids`
            and `attention_mask`, for batches of one shape.
    """

    def __init__(
        self, module: nn.Module, spec: FamilySpec, config: Any, arguments: Mapping[str, Any] | None = None
    ) -> None:
        self.module = module
        self.spec = spec
        self.arguments = dict(arguments or {})
        self.norm_first = norms_come_first(spec, config)
        self.parallel = blocks_are_parallel(spec, config)
        self.scale = 1.0 if spec.residual_scale is None else float(getattr(config, spec.residual_scale))
        self.activation = self.ffn.get_submodule(spec.act_fn) if self.shape.has_ffn else nn.Identity()

    @property
    def shape(self) -> LayerShape:
        """What the layer is now, as far as its attention knows."""
        module = self.module.get_submodule(self.spec.attention)
        assert isinstance(module, PrunedAttention | DroppedAttention)
        return module.shape

    @property
    def attention(self) -> PrunedAttention:
        """The attention module."""
        module = self.module.get_submodule(self.spec.attention)
        assert isinstance(module, PrunedAttention)
        return module

    @property
    def out_projection(self) -> nn.Linear:
        """The output projection of attention."""
        return self._linear(self.attention, self.spec.o)

    @property
    def down_projection(self) -> nn.Linear:
        """The output projection of the FFN."""
        return self._linear(self.ffn, self.spec.down)

    @property
    def ffn(self) -> nn.Module:
        """The module that holds the FFN's Linears."""
        return self.module.get_submodule(self.spec.mlp) if self.spec.mlp else self.module

    @staticmethod
    def _linear(module: nn.Module, slot: Slot) -> Any:
        """Return a Linear; a layer that is only run, not read, may have two factors there."""
        linear = module.get_submodule(slot.path)
        assert isinstance(linear, nn.Linear | FactoredLinear)
        return linear

    def _norm(self, name: str | None, states: Tensor) -> Tensor:
        return states if name is None else self.module.get_submodule(name)(states)

    def attention_input(self, hidden_BTD: Tensor) -> Tensor:
        """Return what the attention projections read, [B, T, D]."""
        return self._norm(self.spec.attention_norm, hidden_BTD) if self.norm_first else hidden_BTD

    def add_attention(self, hidden_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """Return the hidden states after the attention block adds this, [B, T, D]."""
        hidden = hidden_BTD + output_BTD
        return hidden if self.norm_first else self._norm(self.spec.attention_norm, hidden)

    def output_norm(self, site: str) -> nn.Module | None:
        """Return the norm of the raw output of a site, or None."""
        name = {ATTENTION: self.spec.attention_out_norm, FFN: self.spec.ffn_out_norm}[site]
        return None if name is None else self.module.get_submodule(name)

    def output_gain(self, site: str) -> Tensor | None:
        """Return the factor of each output channel between the raw output and what is added, [D], float64 on the CPU.

        With an output norm, what is added is this times the raw output divided by its root mean square. None is 1.
        """
        norm = self.output_norm(site)
        if norm is None:
            size = self.output_projection(site).out_features
            return None if self.scale == 1.0 else torch.full((size,), self.scale).double()
        weight = norm.get_parameter("weight").detach().to("cpu").to(torch.float64)
        return (weight + self.spec.norm_offset) * self.scale

    def added(self, site: str, raw_BTD: Tensor) -> Tensor:
        """Return what a site adds to the residual stream for a raw output, [B, T, D]."""
        norm = self.output_norm(site)
        output = raw_BTD if norm is None else norm(raw_BTD)
        return output if self.scale == 1.0 else output * self.scale

    def raw_output(self, attention: PrunedAttention, hidden_BTD: Tensor) -> Tensor:
        """Return what o_proj of an attention module gives, [B, T, D]."""
        context = self.context(attention, self.attention_input(hidden_BTD))
        return self._linear(attention, self.spec.o)(context)

    def raw_ffn_output(self, hidden_BTD: Tensor) -> Tensor:
        """Return what down_proj gives, [B, T, D]."""
        return self.down_projection(self.act(self.ffn_input(hidden_BTD)))

    def project(self, attention: PrunedAttention, input_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [B, H, T, r], key [B, K, T, r] (both after RoPE) and value [B, K, T, p]."""
        return attention.project(
            input_BTD, self.arguments.get("position_embeddings"), self.arguments.get("position_ids")
        )

    def attend(self, attention: PrunedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the input of o_proj, [B, T, H * p], for what `project` gave."""
        context, _ = attention.attend(query, key, value, self.arguments.get("attention_mask"))
        return context

    def context(self, attention: PrunedAttention, input_BTD: Tensor) -> Tensor:
        """Return the input of o_proj, [B, T, H * p]."""
        return self.attend(attention, *self.project(attention, input_BTD))

    def attention_output(self, attention: PrunedAttention, hidden_BTD: Tensor) -> Tensor:
        """Return what an attention module adds to the hidden states, [B, T, D]."""
        return self.added(ATTENTION, self.raw_output(attention, hidden_BTD))

    def before_ffn(self, hidden_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """Return what is kept until the FFN runs, [B, T, D]: the hidden states after attention adds its output.

        Where the FFN reads the input of the layer, that input is kept, and attention is computed again later.
        """
        return hidden_BTD if self.parallel else self.add_attention(hidden_BTD, output_BTD)

    def attention_step(self, hidden_BTD: Tensor) -> Tensor:
        """Return what is kept until the FFN runs, [B, T, D]."""
        if self.parallel:
            return hidden_BTD
        if not self.shape.has_attention:
            return self.add_attention(hidden_BTD, torch.zeros_like(hidden_BTD))
        return self.add_attention(hidden_BTD, self.attention_output(self.attention, hidden_BTD))

    def ffn_residual(self, kept_BTD: Tensor, attention: PrunedAttention | None = None) -> Tensor:
        """Return what the FFN adds to, [B, T, D], of what was kept until it runs.

        Args:
            kept_BTD: from `before_ffn` or `attention_step`.
            attention: the attention module, where it is not the layer's own.
        """
        if not self.parallel or (attention is None and not self.shape.has_attention):
            return kept_BTD
        return self.add_attention(kept_BTD, self.attention_output(attention or self.attention, kept_BTD))

    def ffn_input(self, hidden_BTD: Tensor) -> Tensor:
        """Return what up and gate read, [B, T, D]."""
        return self._norm(self.spec.ffn_norm, hidden_BTD) if self.norm_first else hidden_BTD

    def preactivations(self, input_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the outputs of up and gate, [B, T, F] each; gate is None when the FFN is not gated."""
        spec = self.spec
        up = self._linear(self.ffn, spec.up)(input_BTD)
        if spec.gate is None:
            return up, None
        if spec.gate.path == spec.up.path:
            parts = up.chunk(len(spec.up.parts), dim=-1)
            return parts[spec.up.part], parts[spec.gate.part]
        return up, self._linear(self.ffn, spec.gate)(input_BTD)

    def act(self, input_BTD: Tensor) -> Tensor:
        """Return the input of down_proj, [B, T, F]."""
        up, gate = self.preactivations(input_BTD)
        return self.activation(up) if gate is None else self.activation(gate) * up

    def add_ffn(self, hidden_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """Return the hidden states after the FFN block adds this, [B, T, D]."""
        hidden = hidden_BTD + output_BTD
        return hidden if self.norm_first else self._norm(self.spec.ffn_norm, hidden)

    def ffn_output(self, hidden_BTD: Tensor) -> Tensor:
        """Return what the FFN adds to the hidden states, [B, T, D]."""
        return self.added(FFN, self.raw_ffn_output(hidden_BTD))

    def ffn_step(self, hidden_BTD: Tensor) -> Tensor:
        """Return the hidden states after the layer, [B, T, D], of what `attention_step` gave."""
        residual = self.ffn_residual(hidden_BTD)
        if not self.shape.has_ffn:
            return self.add_ffn(residual, torch.zeros_like(residual))
        return self.add_ffn(residual, self.ffn_output(hidden_BTD))

    def output(self, hidden_BTD: Tensor) -> Tensor:
        """Return the output of the layer, which may lack a site, [B, T, D]."""
        return self.ffn_step(self.attention_step(hidden_BTD))

    def run(
        self, hidden_BTD: Tensor, watch: Callable[[Tensor, Tensor], None] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output of the layer, and its taps: the input of each site's output projection, [B, T, C].

        Args:
            hidden_BTD: input of the layer.
            watch: called with query and key, as `project` gives them.
        """
        query, key, value = self.project(self.attention, self.attention_input(hidden_BTD))
        if watch is not None:
            watch(query, key)
        context = self.attend(self.attention, query, key, value)
        middle = self.add_attention(hidden_BTD, self.added(ATTENTION, self.out_projection(context)))
        act = self.act(self.ffn_input(hidden_BTD if self.parallel else middle))
        return self.add_ffn(middle, self.added(FFN, self.down_projection(act))), {ATTENTION: context, FFN: act}

    def output_projection(self, site: str) -> nn.Linear:
        """Return the output projection of a site."""
        return self.out_projection if site == ATTENTION else self.down_projection


def norm_eps(norm: nn.Module) -> float:
    """Return the epsilon of an RMSNorm, which families call by two names."""
    values = vars(norm)
    return float(values["eps"] if "eps" in values else values["variance_epsilon"])


def _neutral(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module on the CPU, in float32 or float64."""
    return {
        name: tensor.to("cpu", torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    }


def read_attention(block: DecoderLayer, shape: LayerShape) -> AttentionWeights:
    """Return the neutral weights of the attention block (CPU, float32 or float64)."""
    return split_attention(_neutral(block.attention), block.spec, shape)


def read_ffn(block: DecoderLayer, shape: LayerShape) -> FFNWeights:
    """Return the neutral weights of the FFN block (CPU, float32 or float64)."""
    return split_ffn(_neutral(block.ffn), block.spec, shape)
