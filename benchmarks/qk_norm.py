"""What the correction of the norms of narrower queries and keys is worth.

    python benchmarks/qk_norm.py MODEL --calibration FOLDER/train-1mb.txt --held-out FOLDER/test.txt

In each layer all heads keep the same number of rotary pairs, chosen on the calibration text; values and output stay
whole and nothing is repaired. It prints relative root mean square errors on the held-out text:

    plain norm          what an RMSNorm over the kept channels divides by, against what the dense one divides by
    corrected norm      the same with the gain and the epsilon of each head that pruning writes
    exact               output of attention without the scores of the dropped pairs: no norm can do better
    plain, corrected    output of attention with these norms
    plain added, ...    what the norm adds to the error of the block: the root of its square less that of "exact"
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intraslice.checkpoint.source import open_checkpoint
from intraslice.data.calibration import load_calibration
from intraslice.data.windows import first_token, token_stream
from intraslice.evaluation.perplexity import select_windows
from intraslice.layers.decoder import DecoderLayer, norm_eps, read_attention
from intraslice.layers.surgery import write_attention
from intraslice.layers.weights import QKEdit, attention_shape, fuse_qk, kept_channels
from intraslice.methods.blockwise.heads import choose_qk
from intraslice.methods.blockwise.measure import attention_stats
from intraslice.methods.blockwise.options import AttentionOptions
from intraslice.placement import Placement, choose_device
from intraslice.streaming.hidden import HiddenStates, embedded_states
from intraslice.streaming.model import StreamedModel
from intraslice.streaming.propagate import propagate_layer


class Error:
    """A relative root mean square error that is added up batch by batch."""

    def __init__(self) -> None:
        self._difference = self._size = 0.0

    def add(self, found: Tensor, wanted: Tensor) -> None:
        """Add a batch of any shape."""
        self._difference += float((found - wanted).double().square().sum())
        self._size += float(wanted.double().square().sum())

    @property
    def value(self) -> float:
        """The error so far."""
        return math.sqrt(self._difference / self._size)


def narrow_attention(model: StreamedModel, index: int, edit: QKEdit, dense: DecoderLayer, headed: bool) -> DecoderLayer:
    """Return a copy of a layer whose queries and keys are those of an edit."""
    layer = copy.deepcopy(dense)
    shape = model.dense_shapes[index]
    fused, per_kv = fuse_qk(read_attention(dense, shape), edit, model.pairs_to_channels(index), model.spec.interleaved)
    narrow = attention_shape(per_kv, fused, shape.intermediate_size, headed_qk_norm=headed)
    write_attention(layer, model.config, index, narrow, fused, edit.rope_pairs)
    return layer


def measure_layer(
    model: StreamedModel, index: int, share: float, calibration: HiddenStates, held_out: HiddenStates
) -> dict[str, float]:
    """Return the errors of one layer whose heads keep a share of their pairs."""
    layer = model.load_layer(index)
    shape, spec = model.dense_shapes[index], model.spec
    width = 2 * round(share * shape.qk_head_dim / 2)
    weights, pairs = read_attention(layer, shape), model.pairs_to_channels(index)
    stats = attention_stats(model, layer, calibration, full_moment=False)
    # The budget that makes heads this wide: query and output, key and value, of all heads.
    budget = 2.0 * model.config.hidden_size * width * (shape.num_attention_heads + shape.num_key_value_heads)
    options = AttentionOptions(heads="all", head_multiple=2)
    corrected = choose_qk(weights, stats, budget, options, pairs)
    assert corrected.width == width and corrected.query_norm is not None and corrected.rope_pairs is not None
    plain = replace(corrected, query_norm=None, key_norm=None)
    layers = {
        "plain": narrow_attention(model, index, plain, layer, headed=False),
        "corrected": narrow_attention(model, index, corrected, layer, headed=True),
    }
    channels = kept_channels(corrected, pairs, spec.interleaved)
    assert channels is not None and spec.qk_norm is not None
    keys_Kd = torch.zeros(shape.num_key_value_heads, shape.qk_head_dim).scatter(1, channels, 1.0)
    queries_Hd = keys_Kd.repeat_interleave(shape.heads_per_kv[0], 0)
    errors = {name: Error() for name in ("plain norm", "corrected norm", "exact", "plain", "corrected")}
    for part in held_out.slices():
        states = held_out.read(part)
        inputs = layer.attention_input(states)
        output = layer.attention_output(layer.attention, states)
        query, key, value = layer.project(layer.attention, inputs)
        masked = layer.attend(layer.attention, query * queries_Hd[:, None], key * keys_Kd[:, None], value)
        errors["exact"].add(layer.added("attention", layer.out_projection(masked)), output)
        rows = layer.attention.project_rows(inputs)[:2]
        for name, narrow in layers.items():
            errors[name].add(narrow.attention_output(narrow.attention, states), output)
            narrow_rows = narrow.attention.project_rows(inputs)[:2]
            for side, whole, kept in zip(("query", "key"), rows, narrow_rows, strict=True):
                norm = getattr(layer.attention, spec.qk_norm.q if side == "query" else spec.qk_norm.k)
                edit = getattr(corrected, f"{side}_norm") if name == "corrected" else None
                found = divisor(kept, norm_eps(norm))
                if edit is not None:
                    # The rows hold the factors already; the gains multiply what was divided. Their product is the same
                    # for all channels of a head.
                    found = found / (edit.gain * edit.row_scale)[:, 0].float()
                errors[f"{name} norm"].add(found / divisor(whole, norm_eps(norm)), torch.ones_like(found))
    found = {name: error.value for name, error in errors.items()}
    for name in ("plain", "corrected"):
        found[f"{name} added"] = math.sqrt(max(0.0, found[name] ** 2 - found["exact"] ** 2))
    return {"layer": index, "kept": width / shape.qk_head_dim, **found}


def divisor(rows_BTHr: Tensor, eps: float) -> Tensor:
    """Return what an RMSNorm over the last dimension divides by, [B, T, H]."""
    return (rows_BTHr.float().square().mean(-1) + eps).sqrt()


def table(rows: list[dict[str, float]]) -> str:
    """Return the mean over the layers, for each share of kept pairs, as markdown."""
    names = [name for name in rows[0] if name not in ("layer", "kept")]
    lines = [f"| pairs kept | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for kept in sorted({row["kept"] for row in rows}, reverse=True):
        chosen = [row for row in rows if row["kept"] == kept]
        means = [sum(row[name] for row in chosen) / len(chosen) for name in names]
        lines.append(f"| {kept:.0%} | {' | '.join(f'{mean:.1%}' for mean in means)} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Measure layer by layer and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--num-samples", type=int, default=16, help="sequences of either text")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--shares", default="0.875,0.75,0.5", help="of the pairs, that stay")
    parser.add_argument("--out", type=Path, help="write the rows of all layers there, as JSON")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    if checkpoint.spec.qk_norm is None or checkpoint.spec.qk_norm.over != "head":
        parser.error(f"{args.model} has no norms of query and key in each head")
    tokenizer: Any = checkpoint.load_tokenizer()
    calibration = load_calibration(
        str(args.calibration),
        tokenizer,
        num_samples=args.num_samples,
        seqlen=args.seqlen,
        seed=0,
        vocab_size=checkpoint.config.vocab_size,
        model_folder=checkpoint.folder,
        starts_with=first_token(checkpoint.config),
    ).tokens
    text = token_stream(args.held_out.read_text(encoding="utf-8"), tokenizer)
    held_out = select_windows(checkpoint.config, text, args.seqlen, args.num_samples)
    placement = Placement(choose_device(), torch.float32, torch.float32, torch.float64)
    model = StreamedModel(checkpoint, placement, (2, args.seqlen))
    streams = [embedded_states(model, tokens, None) for tokens in (calibration, held_out)]
    model.release()
    rows = []
    for index in range(model.num_layers):
        if model.rotated(index):
            rows += [measure_layer(model, index, float(share), *streams) for share in args.shares.split(",")]
            print(json.dumps(rows[-1]), flush=True)
        for stream in streams:
            propagate_layer(model.load_layer(index), stream)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
