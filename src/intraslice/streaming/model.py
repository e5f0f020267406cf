"""A model of which at most one decoder layer is in memory.

Shapes: N sequences, T tokens a sequence, D hidden_size, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intraslice.checkpoint.reader import Checkpoint
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer, norms_come_first
from intraslice.layers.head import LanguageHead
from intraslice.layers.logit_loss import Target, logit_loss
from intraslice.layers.sites import ModelSites, layer_sites
from intraslice.placement import Placement
from intraslice.runtime.configuration_intraslice import dense_shapes, rotary_dim, rotated
from intraslice.runtime.families_intraslice import LayerShape
from intraslice.runtime.modeling_intraslice import apply_layer_shape, pair_channels

_LOGIT_POSITIONS = 512  # positions whose logits exist at once in the loss

_ARGUMENTS = ("attention_mask", "position_embeddings", "position_ids")  # what layers are run with


class _Recorder(nn.Module):
    """Stands where a decoder layer was: keeps what the model hands to it, and passes the hidden states on.

    Args:
        layer: the layer without weights (meta device).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.replacement: Tensor | None = None
        # In a tuple, so that it is no submodule.
        self._layer = (layer,)
        self._signature = inspect.signature(layer.forward)
        self._gives_tuple: bool | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden = hidden_states
        # Some models hand everything over by position.
        given = self._signature.bind(hidden_states, *args, **kwargs).arguments
        given |= given.get("kwargs", {})
        self.arguments = {name: given.get(name) for name in _ARGUMENTS}
        if self._gives_tuple is None:
            # Annotations are not always right; without weights the layer itself can say it for nothing.
            with torch.no_grad():
                output = self._layer[0](*_on_meta((hidden_states, *args)), **_on_meta(kwargs))
            self._gives_tuple = isinstance(output, tuple)
        passed = hidden_states if self.replacement is None else self.replacement
        return (passed, None) if self._gives_tuple else passed


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: _on_meta(part) for name, part in value.items()}
    return tuple(map(_on_meta, value)) if isinstance(value, tuple) else value


class StreamedModel:
    """Embeddings, head and masks of a checkpoint; its decoder layers are loaded one at a time.

    The Hugging Face model itself runs, with recorders instead of layers: so masks, positions and rotary tables of
    every layer are the model's own, without any family code.

    Args:
        checkpoint: the opened dense checkpoint.
        placement: device and dtypes.
        batch_shape: sequences in a batch and tokens in a sequence, (B, T): all batches have this shape, because
            masks and rotary tables are made once.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement, batch_shape: tuple[int, int]) -> None:
        self.checkpoint = checkpoint
        self.placement = placement
        self.config = checkpoint.config
        self.spec = checkpoint.spec
        self.norm_first = norms_come_first(self.spec, self.config)
        self.dense_shapes: tuple[LayerShape, ...] = dense_shapes(self.config, self.spec)
        self.model = checkpoint.skeleton().eval().requires_grad_(False)
        parent_path, _, name = self.spec.layers.rpartition(".")
        self._decoder = self.model.get_submodule(parent_path)
        layers = self.model.get_submodule(self.spec.layers)
        assert isinstance(layers, nn.ModuleList)
        self.num_layers = len(layers)
        self._skeletons = list(layers)
        self._recorders = [_Recorder(layer) for layer in self._skeletons]
        setattr(self._decoder, name, nn.ModuleList(self._recorders))
        width = self.config.hidden_size
        self.sites = ModelSites(tuple(layer_sites(self.spec, shape, width) for shape in self.dense_shapes))
        self._materialise()
        self.batch_shape = batch_shape
        self.embed(torch.zeros(batch_shape, dtype=torch.int64))
        self._arguments = [recorder.arguments for recorder in self._recorders]
        self._changed: Callable[[int], Mapping[str, Tensor]] | None = None

    def _materialise(self) -> None:
        device, dtype = self.placement.device, self.placement.compute_dtype
        rest = {name: tensor.to(device, dtype) for name, tensor in self.checkpoint.load_rest().items()}
        self.model.load_state_dict(rest, strict=False, assign=True)
        self.model.tie_weights()
        self._restore_buffers()
        self.model.requires_grad_(False)

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        """Make the buffers anew that no checkpoint holds and that were lost on the meta device.

        Rotary tables, factors of embeddings: the model itself knows how to fill them.
        """
        for module in self.model.modules():
            buffers = dict(module.named_buffers(recurse=False))
            lost = {name: buffer for name, buffer in buffers.items() if buffer.device.type == "meta"}
            if not lost:
                continue
            for name, buffer in lost.items():
                # A factor that was rounded like the weights on disk would stay so in a wider computation.
                dtype = buffer.dtype
                if buffer.is_floating_point():
                    dtype = torch.promote_types(dtype, self.placement.compute_dtype)
                setattr(module, name, torch.empty_like(buffer, dtype=dtype, device=self.placement.device))
            for parameter in module.parameters(recurse=False):
                # What was loaded must stay; this is the mark that transformers itself sets.
                setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 - no attribute of the class
            self.model._init_weights(module)

    def rotated(self, index: int) -> bool:
        """Return whether layer `index` rotates query and key."""
        return rotated(self.config, self.spec, index)

    def pairs_to_channels(self, index: int) -> Tensor | None:
        """Return the channels of each rotary pair of a dense head of layer `index`, [d / 2, 2]; None without RoPE."""
        if not self.rotated(index):
            return None
        return pair_channels(
            rotary_dim(self.config, index), self.dense_shapes[index].qk_head_dim, self.spec.interleaved
        )

    @property
    def can_share_pairs(self) -> bool:
        """Whether stock runtimes can be told a subset of RoPE pairs that all heads keep.

        There is no room in it for channels that are not rotated, and the config of some families takes no subset.
        """
        whole = all(
            rotary_dim(self.config, index) == shape.qk_head_dim for index, shape in enumerate(self.dense_shapes)
        )
        return self.spec.rope_subset and whole

    @property
    def heads_divide_hidden(self) -> bool:
        """Whether the stock class refuses head counts that do not divide hidden_size.

        Without biases some models can be written as another family that computes the same and does not refuse.
        """
        biases = (self.spec.qkv_bias, self.spec.o_bias)
        biased = any(getattr(self.config, bias) if isinstance(bias, str) else bias for bias in biases)
        return self.spec.heads_divide_hidden and (self.spec.stand_in is None or biased)

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return the input of the first layer, [B, T, D], for a batch of token ids [B, T]."""
        assert tuple(tokens_BT.shape) == self.batch_shape, "every batch has the shape that the masks were made for"
        self.model.base_model(input_ids=tokens_BT.to(self.placement.device), use_cache=False)
        hidden = self._recorders[0].hidden
        assert hidden is not None
        for recorder in self._recorders:
            recorder.hidden = None
        return hidden

    def change_weights(self, changed: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Let layers be loaded with other weights from now on, in the place of some of those of the checkpoint.

        Args:
            changed: for the number of a layer, tensors by name within the layer.
        """
        self._changed = changed

    def load_layer(self, index: int) -> DecoderLayer:
        """Return layer `index` at its dense shape, on the compute device."""
        layer = copy.deepcopy(self._skeletons[index])  # on the meta device: no weights are copied
        apply_layer_shape(layer, self.config, self.spec, index, self.dense_shapes[index])
        tensors = self.checkpoint.load_layer(index)
        if self._changed is not None:
            tensors.update(self._changed(index))
        return self._filled(index, layer, tensors)

    def load_pruned_layer(self, index: int, shape: LayerShape, tensors: dict[str, Tensor]) -> DecoderLayer:
        """Return a finished layer from its stored tensors."""
        layer = copy.deepcopy(self._skeletons[index])
        apply_layer_shape(layer, self.config, self.spec, index, shape)
        return self._filled(index, layer, tensors)

    def _filled(self, index: int, layer: nn.Module, tensors: dict[str, Tensor]) -> DecoderLayer:
        device, dtype = self.placement.device, self.placement.compute_dtype
        placed = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }
        layer.load_state_dict(placed, assign=True)
        return DecoderLayer(layer.eval().requires_grad_(False), self.spec, self.config, self._arguments[index])

    def stored_tensors(self, block: DecoderLayer) -> dict[str, Tensor]:
        """Return the tensors of a layer as they are saved, by name relative to the layer."""
        save = self.placement.save_dtype
        return {
            name: tensor.detach().to("cpu", save if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in block.module.state_dict().items()
        }

    def loss_gradient(self, tokens_NT: Tensor, top_NTD: Tensor) -> tuple[float, Tensor]:
        """Return the sum over sequences of the mean token NLL, and its gradient at the output of the last layer.

        The logits of at most 512 positions, all sequences counted, exist at once.

        Args:
            tokens_NT: token ids of the sequences.
            top_NTD: output of the last layer.

        Raises:
            NumericalError: the loss is NaN or infinite.
        """
        tokens = tokens_NT.to(self.placement.device)
        head = LanguageHead(self.model)
        with torch.enable_grad():
            top = top_NTD.detach().requires_grad_(True)
            output = self._after_layers(tokens, top)
            final = output.detach().requires_grad_(True)
            total = 0.0
            positions = tokens.shape[1] - 1
            step = max(1, _LOGIT_POSITIONS // tokens.shape[0])
            for start in range(0, positions, step):
                stop = min(start + step, positions)
                logits = head(final[:, start:stop]).float()
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1), tokens[:, start + 1 : stop + 1].flatten(), reduction="sum"
                )
                (loss / positions).backward()
                total += float(loss.detach()) / positions
            if not torch.isfinite(torch.tensor(total)):
                raise NumericalError("the loss on the calibration text is NaN or infinite.")
            (gradient,) = torch.autograd.grad(output, top, final.grad)
        return total, gradient

    def divergence_gradient(self, tokens_BT: Tensor, top_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
        """Return the gradient of the sum over positions of KL(dense || these predictions) at the last layer's output.

        Args:
            tokens_BT: token ids.
            top_BTD: output of the last layer.
            dense_BTD: what the head reads in the dense model.

        Raises:
            NumericalError: the divergence is NaN or infinite.
        """
        head = LanguageHead(self.model)
        target = Target(
            head=head,
            hidden=dense_BTD.flatten(0, 1),
            next_tokens=tokens_BT.new_full((tokens_BT.numel(),), -1),
            task_weight=0.0,
        )
        with torch.enable_grad():
            top = top_BTD.detach().requires_grad_(True)
            output = self._after_layers(tokens_BT.to(self.placement.device), top)
            # A mean would be lost in half precision.
            loss = logit_loss(head, output.flatten(0, 1), target) * tokens_BT.numel()
            if not torch.isfinite(loss):
                raise NumericalError("the divergence from the dense model is NaN or infinite.")
            (gradient,) = torch.autograd.grad(loss, top)
        return gradient

    @torch.no_grad()
    def after_layers(self, tokens_BT: Tensor, top_BTD: Tensor) -> Tensor:
        """Return what the head reads, [B, T, D], for outputs of the last layer [B, T, D]."""
        return self._after_layers(tokens_BT.to(self.placement.device), top_BTD)

    def _after_layers(self, tokens_BT: Tensor, top_BTD: Tensor) -> Tensor:
        self._recorders[-1].replacement = top_BTD
        try:
            return self.model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        finally:
            self._recorders[-1].replacement = None

    def release(self) -> None:
        """Free the embeddings and the head, which the layers do not need."""
        self.model.to_empty(device="meta")
