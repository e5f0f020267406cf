"""What the loss says of every weight: the element-wise Taylor importance of heads and channels, of the dense model.

The gradients are summed over all sequences before their size is taken, so the sums take four bytes for each weight of
the layers; that is why only the score that reads them asks for them.

Shapes: S sequences, T tokens, D hidden_size, H query heads, K kv heads, d head_dim, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from intraslice.algebra.statistics import Statistics
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer
from intraslice.layers.sites import ATTENTION, FFN
from intraslice.layers.state_dict import split_attention, split_ffn
from intraslice.layers.weights import AttentionWeights, FFNWeights
from intraslice.progress import Progress
from intraslice.runtime.families_intraslice import FamilySpec
from intraslice.streaming.backward import backward_pass, passes
from intraslice.streaming.model import StreamedModel

UnitScores = dict[str, tuple[float, ...]]
"""By the name of the site, one number per unit."""


def measure_taylor(
    model: StreamedModel, tokens_ST: Tensor, *, boundary_bytes: int, progress: Progress
) -> tuple[UnitScores, ...]:
    """Return for each layer what its heads and channels are worth: the sum over their weights of |w dL/dw|.

    L is the sum over the sequences of the mean loss of a token. Paper: LLM-Pruner, element-wise, first order.

    Args:
        model: the streamed dense model.
        tokens_ST: calibration token ids, [S, T].
        boundary_bytes: memory for the states at the layer boundaries of one chunk.
        progress: shows the passes.

    Raises:
        NumericalError: a gradient is NaN or infinite.
    """
    sums = [_statistics(model, index) for index in range(model.num_layers)]

    def step(index: int, layer: DecoderLayer, hidden: Tensor, gradient: Tensor) -> Tensor:
        return _backward(layer, hidden, gradient, sums[index])

    with progress.step("weight gradients", total=passes(model, tokens_ST)) as advance:
        backward_pass(model, tokens_ST, step, boundary_bytes=boundary_bytes, advance=advance)
    return tuple(_unit_scores(model, index, sums[index].finish()) for index in range(model.num_layers))


def _statistics(model: StreamedModel, index: int) -> Statistics:
    """Return a sum for the gradients of each Linear of a layer, by path."""
    statistics = Statistics(torch.device("cpu"), torch.float32)
    for path, size in model.spec.linear_sizes(model.dense_shapes[index], model.config.hidden_size).items():
        statistics.sum(path, *size)
    return statistics


def _linears(layer: DecoderLayer) -> dict[str, nn.Linear]:
    """Return the Linears of a layer by path."""
    paths = [path for reads, writes in (layer.spec.attention_paths, layer.spec.ffn_paths) for path in (*reads, writes)]
    found = {path: layer.module.get_submodule(path) for path in paths}
    return {path: linear for path, linear in found.items() if isinstance(linear, nn.Linear)}


def _backward(layer: DecoderLayer, hidden_BTD: Tensor, gradient_BTD: Tensor, sums: Statistics) -> Tensor:
    """Add the gradients of the layer's weights to the sums, and return that of its input, [B, T, D]."""
    linears = _linears(layer)
    weights = [linear.weight.requires_grad_(True) for linear in linears.values()]
    with torch.enable_grad():
        hidden = hidden_BTD.detach().requires_grad_(True)
        output, _ = layer.run(hidden)
        at_input, *of_weights = torch.autograd.grad(output, (hidden, *weights), gradient_BTD)
    for path, weight, gradient in zip(linears, weights, of_weights, strict=True):
        weight.requires_grad_(False)
        sums.of(path).update(gradient.to("cpu", torch.float32))
    return at_input


def _unit_scores(model: StreamedModel, index: int, gradients: Mapping[str, Tensor]) -> UnitScores:
    layer, shape = model.load_layer(index), model.dense_shapes[index]
    sizes = {
        f"{path}.weight": (linear.weight.detach().cpu().double() * gradients[path]).abs()
        for path, linear in _linears(layer).items()
    }
    if not all(bool(torch.isfinite(size).all()) for size in sizes.values()):
        raise NumericalError(f"the weight gradients of layer {index} are NaN or infinite.")
    spec: FamilySpec = layer.spec
    # Norms of query and key are no weights of a unit, but the split asks for them.
    attention, ffn = (_with_sizes(module, sizes, path) for module, path in _modules(layer, spec))
    return {
        ATTENTION: tuple(head_sums(split_attention(attention, spec, shape)).tolist()),
        FFN: tuple(channel_sums(split_ffn(ffn, spec, shape)).tolist()),
    }


def _modules(layer: DecoderLayer, spec: FamilySpec) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
    """Return attention and FFN with their paths within the layer, a dot behind."""
    return (layer.attention, f"{spec.attention}."), (layer.ffn, f"{spec.mlp}." if spec.mlp else "")


def _with_sizes(module: nn.Module, sizes: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the tensors of a module by name, with the sizes in the place of the weights."""
    found: dict[str, Tensor] = dict(module.state_dict())
    for name in found:
        if path + name in sizes:
            found[name] = sizes[path + name]
    return found


def head_sums(sizes: AttentionWeights) -> Tensor:
    """Return the sum over the weights of each query head, [H]: q and o, and its part of the shared k and v."""
    heads, group = len(sizes.q), sizes.group
    own = sizes.q.sum((1, 2)) + sizes.o.unflatten(1, (heads, -1)).sum((0, 2))
    shared = sizes.k.sum((1, 2)) + sizes.v.sum((1, 2))
    return own + shared.repeat_interleave(group) / group


def channel_sums(sizes: FFNWeights) -> Tensor:
    """Return the sum over the weights of each channel, [F]: its rows of up and gate, its column of down."""
    total = sizes.up.sum(1) + sizes.down.sum(0)
    return total if sizes.gate is None else total + sizes.gate.sum(1)
