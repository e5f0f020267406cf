"""Calibration tokens: a text cut into sequences, or sequences sampled from the dense model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from intraslice.data.mixture import check_source, parse_source, share_out, short_source
from intraslice.data.sampled_rows import fingerprint
from intraslice.data.sampling import sample
from intraslice.data.text import SAMPLED, load_text
from intraslice.data.windows import begin_windows, token_stream
from intraslice.errors import CalibrationError
from intraslice.progress import Progress, SilentProgress

# Characters of shipped text to gather for a token; the tokenizers in use make one of 3.5 to 4.5.
SHIPPED_CHARS_PER_TOKEN = 5


@dataclass(frozen=True)
class Calibration:
    """What the model is shown.

    Attributes:
        tokens: token ids, int64 [N, T].
        source: name or path of the text, or a mixture, whose paths are without folders.
        seed: of the choice of sequences, or of the sampling.
        fingerprint: sha256 of the tokens.
        parts: of a mixture, how many sequences come from which source; empty for a single source.
    """

    tokens: torch.Tensor
    source: str
    seed: int
    fingerprint: str
    parts: dict[str, int] = field(default_factory=dict)


def load_calibration(
    source: str,
    tokenizer: Any,
    *,
    num_samples: int,
    seqlen: int,
    seed: int,
    vocab_size: int,
    model_folder: Path,
    model_arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    text_field: str | None = None,
    device: str = "auto",
    sampled_folder: Path | None = None,
    starts_with: int | None = None,
) -> Calibration:
    """Return `num_samples` sequences of `seqlen` tokens.

    A text is one token stream, cut into non-overlapping blocks of `seqlen`; a seeded random choice of them is
    taken, none twice. In a mixture, each sequence comes from one source, and their order is drawn by the seed.

    Args:
        source: name of a text, a .txt, .jsonl or .parquet file, or a mixture of them (see `data.mixture`).
        tokenizer: Hugging Face tokenizer of the model.
        num_samples: N.
        seqlen: T.
        seed: of the choice, or of the sampling.
        vocab_size: token ids of the model are below this.
        model_folder: folder of the dense model; "self" loads it.
        model_arguments: what `from_pretrained` needs besides, where the model is the text tower of a composite one.
        progress: shows the sampling.
        text_field: column of a .jsonl or .parquet file.
        device: where "self" samples: "auto", "cpu" or a torch device.
        sampled_folder: keeps what is sampled, and has what was; of this very model. None keeps nothing.
        starts_with: token in the place of the first one of each sequence, for models that need it.

    Raises:
        CalibrationError: the text is unknown, unreadable, empty or too short, or does not fit the model.
        MissingExtraError: the text needs a package that is not installed.
        NumericalError: the model that is sampled from gives NaN.
    """
    if num_samples < 1 or seqlen < 2:
        raise CalibrationError(
            f"{num_samples} sequences of {seqlen} tokens cannot calibrate anything; use at least 1 of 2"
        )
    progress = progress or SilentProgress()
    check_source(source)
    parts = parse_source(source)
    counts = share_out(parts, num_samples)
    blocks: list[torch.Tensor | None] = [None] * len(parts)
    sampled = [index for index, part in enumerate(parts) if part.source in SAMPLED and counts[index]]
    for index, part in enumerate(parts):
        if index not in sampled and counts[index]:
            # The one place that decides how much shipped text is needed, so that it depends on nothing else.
            enough = SHIPPED_CHARS_PER_TOKEN * counts[index] * seqlen
            text = load_text(
                part.source, text_field=text_field, min_chars=enough, progress=progress, tokenizer=tokenizer
            )
            blocks[index] = _choose_blocks(token_stream(text, tokenizer), part.source, counts[index], seqlen, seed)
    if sampled:
        # Last, because it takes longest and all else may still be refused; together, because the model is loaded once.
        sources = [parts[index].source for index in sampled for _ in range(counts[index])]
        rows = sample(
            model_folder, model_arguments or {}, tokenizer, sources, seqlen, seed, device, progress, sampled_folder
        )
        for index, own in zip(sampled, rows.split([counts[index] for index in sampled]), strict=True):
            blocks[index] = own
    tokens = torch.cat([own for own in blocks if own is not None])  # [N, T]
    if len(parts) > 1:
        tokens = tokens[torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))]
    tokens = begin_windows(tokens, starts_with)
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        worst = int(tokens.max()) if int(tokens.max()) >= vocab_size else int(tokens.min())
        raise CalibrationError(
            f"token id {worst} is outside the model's vocabulary of {vocab_size}; tokenizer and model do not "
            "belong together"
        )
    if len(parts) == 1:
        return Calibration(tokens, parts[0].source, seed, fingerprint(tokens))
    given = {part.source: count for part, count in zip(parts, counts, strict=True)}
    return Calibration(tokens, short_source(source), seed, fingerprint(tokens), given)


def _choose_blocks(stream: torch.Tensor, source: str, num_samples: int, seqlen: int, seed: int) -> torch.Tensor:
    num_blocks = len(stream) // seqlen
    if num_blocks < num_samples:
        raise CalibrationError(
            f"text {source!r} has {len(stream)} tokens, which is {num_blocks} sequences of {seqlen}, but "
            f"{num_samples} sequences ({num_samples * seqlen} tokens) are asked for; use a longer text, "
            "fewer sequences or shorter ones"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(num_blocks, generator=generator)[:num_samples]
    return stream[: num_blocks * seqlen].view(num_blocks, seqlen)[chosen]  # [N, T]
