"""A model of which at most one decoder layer is in memory.

Shapes: N sequences, T tokens a sequence, D hidden_size, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from intraslice.checkpoint.reader import Checkpoint
from intraslice.errors import NumericalError
from intraslice.layers.decoder import DecoderLayer, norms_come_first
from intraslice.layers.sites import ModelSites, layer_sites
from intraslice.placement import Placement
from intraslice.runtime.configuration_intraslice import dense_shape, rotary_dim
from intraslice.runtime.families_intraslice import LayerShape
from intraslice.runtime.modeling_intraslice import apply_layer_shape, pair_channels

_LOGIT_POSITIONS = 512  # positions whose logits exist at once in the loss


class _Recorder(nn.Module):
    """Stands where a decoder layer was: keeps what the model hands to it, and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        self.replacement: Tensor | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states
        self.kwargs = {name: kwargs.get(name) for name in ("attention_mask", "position_embeddings")}
        return hidden_states if self.replacement is None else self.replacement


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
        self.dense_shape: LayerShape = dense_shape(self.config, self.spec)
        self.model = checkpoint.skeleton().eval().requires_grad_(False)
        parent_path, _, name = self.spec.layers.rpartition(".")
        self._decoder = self.model.get_submodule(parent_path)
        layers = self.model.get_submodule(self.spec.layers)
        assert isinstance(layers, nn.ModuleList)
        self.num_layers = len(layers)
        self._skeletons = list(layers)
        self._recorders = [_Recorder() for _ in self._skeletons]
        setattr(self._decoder, name, nn.ModuleList(self._recorders))
        self.sites = ModelSites((layer_sites(self.spec, self.dense_shape, self.config.hidden_size),) * self.num_layers)
        self._materialise()
        self.batch_shape = batch_shape
        self.embed(torch.zeros(batch_shape, dtype=torch.int64))
        self._arguments = [recorder.kwargs for recorder in self._recorders]

    def _materialise(self) -> None:
        device, dtype = self.placement.device, self.placement.compute_dtype
        rest = {name: tensor.to(device, dtype) for name, tensor in self.checkpoint.load_rest().items()}
        self.model.load_state_dict(rest, strict=False, assign=True)
        self.model.tie_weights()
        if self.spec.rope:
            # Rotary tables are not in the checkpoint and were lost on the meta device.
            rotary = self._decoder.get_submodule("rotary_emb")
            self._decoder.rotary_emb = type(rotary)(config=self.config).to(device)
        self.model.requires_grad_(False)

    @property
    def pairs_to_channels(self) -> Tensor | None:
        """Channels of each rotary pair of a dense head, [d / 2, 2]; None without RoPE."""
        if not self.spec.rope:
            return None
        return pair_channels(rotary_dim(self.config), self.dense_shape.qk_head_dim)

    @property
    def can_share_pairs(self) -> bool:
        """Whether stock runtimes can be told a subset of RoPE pairs that all heads keep.

        There is no room in it for channels that are not rotated, and the config of some families takes no subset.
        """
        return self.spec.rope_subset and rotary_dim(self.config) == self.dense_shape.qk_head_dim

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

    def load_layer(self, index: int) -> DecoderLayer:
        """Return layer `index` at its dense shape, on the compute device."""
        layer = copy.deepcopy(self._skeletons[index])  # on the meta device: no weights are copied
        apply_layer_shape(layer, self.config, self.spec, index, self.dense_shape)
        return self._filled(index, layer, self.checkpoint.load_layer(index))

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
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        with torch.enable_grad():
            top = top_NTD.detach().requires_grad_(True)
            self._recorders[-1].replacement = top
            output = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            self._recorders[-1].replacement = None
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

    def release(self) -> None:
        """Free the embeddings and the head, which the layers do not need."""
        self.model.to_empty(device="meta")
