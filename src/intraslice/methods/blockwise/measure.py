"""Measures the sites of one decoder layer: from hidden states to the sums that scores and repairs read.

Shapes: B sequences of a batch, T tokens, N = B * T, D hidden_size, H query heads, K kv heads, d head_dim,
F intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intraslice.algebra.norms import energy_rows
from intraslice.algebra.statistics import Statistics
from intraslice.errors import NumericalError, RecipeError
from intraslice.layers.decoder import DecoderLayer, norm_eps, read_ffn
from intraslice.layers.sites import ATTENTION, FFN
from intraslice.methods.blockwise.channels import own_output, with_own_output
from intraslice.methods.blockwise.heads import AttentionStats, QKNorms
from intraslice.methods.blockwise.options import AttentionOptions, FFNOptions
from intraslice.methods.blockwise.repairs import OutputMoments, merged_halves
from intraslice.methods.blockwise.strategies import REPAIRS, SCORES
from intraslice.placement import for_float64
from intraslice.runtime.modeling_intraslice import PrunedAttention
from intraslice.streaming.hidden import HiddenStates, Streams
from intraslice.streaming.model import StreamedModel


def attention_stats(
    model: StreamedModel,
    layer: DecoderLayer,
    hidden: HiddenStates,
    full_moment: bool,
    values: bool = False,
) -> AttentionStats:
    """Measure the attention of a dense layer.

    Args:
        model: the streamed model the layer belongs to.
        layer: the layer at its dense shape.
        hidden: inputs of the layer.
        full_moment: whether the second moment over all heads is wanted.
        values: whether the second moments of the values are wanted.

    Raises:
        NumericalError: activations are NaN or infinite.
    """
    attention = layer.attention
    shape, dtype = attention.shape, model.placement.stat_dtype
    num_heads, num_kv = shape.num_attention_heads, shape.num_key_value_heads
    qk, v = shape.qk_head_dim, shape.v_head_dim
    stats = Statistics(model.placement.stat_device, dtype)
    context_moment = stats.block_second_moment("context", num_heads, v)
    context_full = stats.second_moment("context_full", num_heads * v) if full_moment else None
    context_sum = stats.sum("context_sum", num_heads * v)
    value_energy = stats.sum("value_energy", num_kv, v)
    query_moment = stats.block_second_moment("query", num_heads, qk)
    key_moment = stats.block_second_moment("key", num_kv, qk)
    key_sum, key_abs = stats.sum("key_sum", num_kv, qk), stats.sum("key_abs", num_kv, qk)
    query_abs = stats.sum("query_abs", num_heads, qk)
    query_square, key_square = stats.sum("query_square", num_heads, qk), stats.sum("key_square", num_kv, qk)
    value_moment = stats.block_second_moment("value", num_kv, v) if values else None
    norms = layer.spec.qk_norm
    query_energy, key_energy = None, None
    if norms is not None:
        # One vector per norm: a head, or all heads of a token together.
        counts = (1, 1) if norms.over == "all" else (num_heads, num_kv)
        widths = (num_heads * qk // counts[0] + 1, num_kv * qk // counts[1] + 1)
        query_energy, key_energy = (
            stats.block_second_moment(name, count, width)
            for name, count, width in zip(("query_energy", "key_energy"), counts, widths, strict=True)
        )
    num_tokens = stats.number("num_tokens")
    for part in hidden.slices():
        states = hidden.read(part)
        query, key, value = layer.project(attention, layer.attention_input(states))
        context = layer.attend(attention, query, key, value)
        context_moment.update(context.flatten(0, 1))
        if context_full is not None:
            context_full.update(context.flatten(0, 1))
        context_sum.update(for_float64(context).sum((0, 1), dtype=dtype))
        value_energy.update(for_float64(value).to(dtype).square().sum((0, 2)))
        query_abs.update(query.abs().sum((0, 2)))
        key_abs.update(key.abs().sum((0, 2)))
        query_square.update(for_float64(query).to(dtype).square().sum((0, 2)))
        key_square.update(for_float64(key).to(dtype).square().sum((0, 2)))
        if value_moment is not None:
            value_moment.update(value.transpose(1, 2).flatten(0, 1).flatten(1))
        if not attention.rotated:
            key_sum.update(key.sum((0, 2)))
            query_moment.update(query.transpose(1, 2).flatten(0, 1).flatten(1))
            key_moment.update(key.transpose(1, 2).flatten(0, 1).flatten(1))
        if norms is not None and query_energy is not None and key_energy is not None:
            # Energies are the same before and after a rotation, so it is enough to look before it.
            raw_query, raw_key, _ = attention.project_rows(layer.attention_input(states))
            for moment, raw, name in ((query_energy, raw_query, norms.q), (key_energy, raw_key, norms.k)):
                vectors = raw.flatten(2)[..., None, :] if norms.over == "all" else raw
                rows = energy_rows(vectors.flatten(0, 1), norm_eps(attention.get_submodule(name)))
                moment.update(rows.flatten(1))
        num_tokens.update(context.shape[0] * context.shape[1])
    sums = stats.finish()
    if not torch.isfinite(sums["context"]).all() or not torch.isfinite(sums["query_abs"]).all():
        raise NumericalError("the attention activations contain NaN or infinite values.")
    return AttentionStats(
        **{"context_full": None, "value": None, **sums, "num_tokens": int(sums["num_tokens"])},  # type: ignore[arg-type]
        norms=None
        if norms is None
        else QKNorms(norms.over, layer.spec.norm_offset, norm_eps(attention.get_submodule(norms.q))),
    )


def context_moments(
    model: StreamedModel,
    layer: DecoderLayer,
    streams: Streams,
    dense: PrunedAttention,
    options: AttentionOptions,
) -> OutputMoments:
    """Measure the context of the trial attention in `layer` against its target, and advance the dense stream.

    The target is what the site should add to the pruned stream x: the dense site's output on x itself, or what leads
    from x to the dense model's stream, (h + dense output on h) - x, or a point between the two (`aimed_between`).
    Measured on the dense stream, it is the dense site's output there.

    Raises:
        RecipeError: the repair asks for two halves of the sequences, and all are in one batch.
    """
    splits, share = REPAIRS[options.repair].splits, share_in_target(options)
    sums = _OutputSums(model, layer.out_projection.in_features, streams, splits)
    aim = OutputAim(layer, ATTENTION)
    if options.measured_on == "dense_stream":
        assert streams.dense is not None
        for part in streams.dense.slices():
            states = streams.dense.read(part)
            raw = layer.raw_output(dense, states)
            target = aim.own(raw)
            sums.update(layer.context(layer.attention, layer.attention_input(states)), *target, target[0])
            streams.dense.write(part, layer.before_ffn(states, layer.added(ATTENTION, raw)))
        return sums.moments()
    for part in streams.pruned.slices():
        states = streams.pruned.read(part)
        target, own = None, None
        if streams.dense is not None:
            dense_states = streams.dense.read(part)
            raw = layer.raw_output(dense, dense_states)
            output = layer.added(ATTENTION, raw)
            if options.repair_against == "dense_stream":
                missing = dense_states + output - states
                if (part_of := aim.drift_share(share)) is not None:
                    missing = aimed_between(layer.attention_output(dense, states), missing, part_of)
                if splits:
                    own, _ = aim.own(layer.raw_output(dense, states))
                target = aim.to_stream(missing, raw)
            streams.dense.write(part, layer.before_ffn(dense_states, output))
        if target is None:
            target = aim.own(layer.raw_output(dense, states))
            own = target[0]
        sums.update(layer.context(layer.attention, layer.attention_input(states)), *target, own)
    return sums.moments()


def ffn_moments(
    model: StreamedModel, layer: DecoderLayer, streams: Streams, dense: PrunedAttention, options: FFNOptions
) -> OutputMoments:
    """Advance the pruned stream through attention and the dense stream through the FFN; measure the dense FFN.

    Args:
        model: the streamed model.
        layer: its attention is pruned, its FFN is not.
        streams: as attention left them.
        dense: the dense attention.
        options: they say what the FFN should give, and which of the streams it reads.

    Raises:
        NumericalError: activations are NaN or infinite.
        RecipeError: the repair asks for two halves of the sequences, and all are in one batch.
    """
    splits, share = REPAIRS[options.repair].splits, share_in_target(options)
    read_width = model.config.hidden_size if SCORES[options.score].needs_reading else None
    sums = _OutputSums(model, layer.down_projection.in_features, streams, splits, read_width)
    aim = OutputAim(layer, FFN)
    on_pruned = options.measured_on == "pruned_stream"
    to_stream = on_pruned and options.repair_against == "dense_stream" and streams.dense is not None
    for part in streams.pruned.slices():
        before = streams.pruned.read(part)
        states = measured = layer.attention_step(before)
        if options.measured_on == "dense_layer":
            measured = layer.before_ffn(before, layer.attention_output(dense, before))
        elif options.measured_on == "dense_stream":
            assert streams.dense is not None
            measured = streams.dense.read(part)
        read = layer.ffn_input(measured)
        sums.update_read(read)
        # Not before: what was read may be the memory that is written.
        streams.pruned.write(part, states)
        act = layer.act(read)
        target = (None, None)
        if streams.dense is not None:
            dense_states = streams.dense.read(part)
            raw = layer.raw_ffn_output(dense_states)
            residual, output = layer.ffn_residual(dense_states, dense), layer.added(FFN, raw)
            if to_stream:
                missing = residual + output - layer.ffn_residual(states)
                if (part_of := aim.drift_share(share)) is not None:
                    missing = aimed_between(layer.added(FFN, layer.down_projection(act)), missing, part_of)
                target = aim.to_stream(missing, raw)
            streams.dense.write(part, layer.add_ffn(residual, output))
        sums.update(act, *target)
    moments = sums.moments()
    if not torch.isfinite(moments.gram).all():
        raise NumericalError("the FFN activations contain NaN or infinite values.")
    down = with_gain(read_ffn(layer, layer.shape).down, layer.output_gain(FFN))
    if not to_stream:
        return own_output(moments, down)
    return with_own_output(moments, down) if splits else moments


def share_in_target(options: AttentionOptions | FFNOptions) -> float:
    """Return the share of the drift in the target that is measured: all of it where the repair chooses the share."""
    return 1.0 if REPAIRS[options.repair].splits else options.drift_share


def with_gain(weight_DP: Tensor, gain_D: Tensor | None) -> Tensor:
    """Return an output projection with the factors that come after it, [D, P]."""
    return weight_DP if gain_D is None else (weight_DP.double() * gain_D[:, None]).to(weight_DP.dtype)


def aimed_between(own_BTD: Tensor, missing_BTD: Tensor, drift_share: float | Tensor) -> Tensor:
    """Return what a site should add: its own output and a share of the drift, y + alpha (m - y), [B, T, D].

    The site's own output y is a function of its inputs. The drift m - y, what the sites before have left undone, mostly
    is not: a regression sees much noise and little of it, and with few tokens a share alpha < 1 estimates it better.

    Args:
        own_BTD: y, what the dense site adds on the pruned stream.
        missing_BTD: m, what leads from the pruned stream to the dense one.
        drift_share: alpha, or one for each output channel, [D].
    """
    return own_BTD + drift_share * (missing_BTD - own_BTD)


class OutputAim:
    """What the output projection of a site should give, with the factors that come after it.

    An output norm divides by the root mean square s of the raw output. It is frozen at what the dense site has there:
    then the site adds g (W z) / s to the stream, so that g W z should be s times what is missing there, and each token
    counts 1 / s^2. Targets are taken without the bias of the projection.

    What is missing in a channel that the norm turns down (g near 0) would need huge weights there, which would be most
    of the norm of the output and turn all other channels down. So of the drift in channel i only the share
    min(1, g_i^2 / mean(g^2)) is aimed at.

    Args:
        layer: the layer.
        site: name of the site.
    """

    def __init__(self, layer: DecoderLayer, site: str) -> None:
        self._norm = layer.output_norm(site)
        linear = layer.output_projection(site)
        gain = layer.output_gain(site)
        self._gain = None if gain is None else gain.to(linear.weight)
        self._reach = None
        if self._norm is not None and self._gain is not None:
            energy = self._gain.square()
            self._reach = (energy / energy.mean()).clamp(max=1.0)
        self._bias = None
        if linear.bias is not None:
            self._bias = linear.bias if self._gain is None else linear.bias * self._gain

    def drift_share(self, share: float) -> float | Tensor | None:
        """Return which share of the drift is aimed at, for all channels or for each [D]; None is all of it."""
        if self._reach is not None:
            return share * self._reach
        return share if share < 1.0 else None

    def own(self, raw_BTD: Tensor) -> tuple[Tensor, None]:
        """Return the dense site's own output as the target; all tokens count the same."""
        return self._without_bias(raw_BTD if self._gain is None else raw_BTD * self._gain), None

    def to_stream(self, missing_BTD: Tensor, dense_raw_BTD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the target that adds what is missing in the stream, and how much each token counts, [B, T] or None.

        Args:
            missing_BTD: what the site should add.
            dense_raw_BTD: raw output of the dense site in the dense model; only an output norm needs it.
        """
        if self._norm is None:
            return self._without_bias(missing_BTD), None
        assert dense_raw_BTD is not None
        energy = dense_raw_BTD.float().square().mean(-1) + norm_eps(self._norm)
        return self._without_bias(missing_BTD * energy.sqrt()[..., None].to(missing_BTD)), 1.0 / energy

    def _without_bias(self, target_BTD: Tensor) -> Tensor:
        return target_BTD if self._bias is None else target_BTD - self._bias


class _OutputSums:
    """Adds up `OutputMoments` batch by batch, of all sequences or of every other batch as well.

    Args:
        model: the streamed model.
        width: inputs of the output projection.
        streams: what is measured.
        splits: whether halves are wanted.
        read_width: channels of what the site itself reads, where their energy is wanted.

    Raises:
        RecipeError: all sequences are in one batch, which has no halves.
    """

    def __init__(
        self, model: StreamedModel, width: int, streams: Streams, splits: bool, read_width: int | None = None
    ) -> None:
        if splits and streams.pruned.num_batches < 2:
            raise RecipeError(
                "repair = cross_fit compares two halves of the calibration text, and all of it is in one batch; give "
                "more --num-samples, lower run.batch_tokens, or set repair = ridge."
            )
        self._splits, self._given = splits, 0
        owns = (True, True) if splits else (False,)
        self._folds = [_FoldSums(model, width, with_own, read_width) for with_own in owns]

    def update_read(self, read_BTD: Tensor) -> None:
        """Add what the site itself reads, where it is wanted."""
        self._folds[self._given % len(self._folds)].update_read(read_BTD)

    def update(
        self,
        inputs_BTP: Tensor,
        targets_BTD: Tensor | None,
        counts_BT: Tensor | None = None,
        own_BTD: Tensor | None = None,
    ) -> None:
        """Add a batch, as `_FoldSums` takes it; after what the site reads of it."""
        self._folds[self._given % len(self._folds)].update(inputs_BTP, targets_BTD, counts_BT, own_BTD)
        self._given += 1

    def moments(self) -> OutputMoments:
        """Return the sums in float64."""
        halves = [fold.moments() for fold in self._folds]
        return merged_halves(*halves) if self._splits else halves[0]


class _FoldSums:
    """Adds up `OutputMoments` batch by batch.

    Args:
        model: the streamed model.
        width: inputs of the output projection.
        with_own: whether the site's own output is given beside the target.
        read_width: channels of what the site itself reads, where their energy is wanted.
    """

    def __init__(self, model: StreamedModel, width: int, with_own: bool, read_width: int | None) -> None:
        outputs = model.config.hidden_size
        self._dtype = model.placement.stat_dtype
        self._statistics = Statistics(model.placement.stat_device, self._dtype)
        self._gram = self._statistics.second_moment("gram", width)
        self._cross = self._statistics.second_moment("cross", width, outputs)
        self._own = self._statistics.second_moment("own_cross", width, outputs) if with_own else None
        self._input_sum = self._statistics.sum("input_sum", width)
        self._target_sum = self._statistics.sum("target_sum", outputs)
        self._energy = self._statistics.number("target_energy")
        self._num_tokens = self._statistics.number("num_tokens")
        self._read_energy = None if read_width is None else self._statistics.sum("read_energy", read_width)

    def update_read(self, read_BTD: Tensor) -> None:
        """Add what the site itself reads, where it is wanted."""
        if self._read_energy is not None:
            self._read_energy.update(for_float64(read_BTD.flatten(0, 1)).to(self._dtype).square().sum(0))

    def update(
        self,
        inputs_BTP: Tensor,
        targets_BTD: Tensor | None,
        counts_BT: Tensor | None = None,
        own_BTD: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            inputs_BTP: inputs of the output projection.
            targets_BTD: what it should give; without them only what the inputs decide is added.
            counts_BT: how much each token counts; None is 1.
            own_BTD: the site's own output.
        """
        inputs = inputs_BTP.flatten(0, 1)
        targets = None if targets_BTD is None else targets_BTD.flatten(0, 1)
        root = None if counts_BT is None else counts_BT.flatten().sqrt().to(inputs)[:, None]
        if root is not None:
            inputs, targets = inputs * root, None if targets is None else targets * root
        self._gram.update(inputs)
        # Sums are of inputs times counts, and the inputs have the root of the counts already.
        summed = inputs if root is None else inputs * root
        self._input_sum.update(for_float64(summed).sum(0, dtype=self._dtype))
        self._num_tokens.update(
            inputs.shape[0] if counts_BT is None else float(for_float64(counts_BT).sum(dtype=torch.float64))
        )
        if self._own is not None and own_BTD is not None:
            own = own_BTD.flatten(0, 1)
            self._own.update(inputs, own if root is None else own * root)
        if targets is not None:
            self._cross.update(inputs, targets)
            summed = targets if root is None else targets * root
            self._target_sum.update(for_float64(summed).sum(0, dtype=self._dtype))
            self._energy.update(float(for_float64(targets.float().square()).sum(dtype=torch.float64)))

    def moments(self) -> OutputMoments:
        """Return the sums in float64."""
        sums = self._statistics.finish()
        return OutputMoments(
            gram=sums["gram"],
            cross=sums["cross"],
            input_sum=sums["input_sum"],
            target_sum=sums["target_sum"],
            target_energy=float(sums["target_energy"]),
            num_tokens=float(sums["num_tokens"]),
            own_cross=sums.get("own_cross"),
            read_energy=sums.get("read_energy"),
        )
