"""Calibration tokens: a text cut into sequences, or sequences sampled from the dense model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intraslice.data.text import SELF, check_source, load_text
from intraslice.errors import CalibrationError, NumericalError
from intraslice.placement import choose_device
from intraslice.progress import Progress, SilentProgress
from intraslice.quiet import quiet

__all__ = ["Calibration", "check_source", "load_calibration", "load_text"]

# How much built-in text to gather for a token; the tokenizers in use make one of 3.5 to 4.5 characters.
BUILT_IN_CHARS_PER_TOKEN = 5
# Memory for the key/value cache while sampling; decides how many sequences grow side by side.
_CACHE_BYTES = 1 << 29


@dataclass(frozen=True)
class Calibration:
    """What the model is shown.

    Attributes:
        tokens: token ids, int64 [N, T].
        source: name or path of the text.
        seed: of the choice of sequences, or of the sampling.
        fingerprint: sha256 of the tokens.
    """

    tokens: torch.Tensor
    source: str
    seed: int
    fingerprint: str


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
) -> Calibration:
    """Return `num_samples` sequences of `seqlen` tokens.

    A text is one token stream, cut into non-overlapping blocks of `seqlen`; a seeded random choice of them is
    taken, none twice.

    Args:
        source: "builtin", "self", "wikitext2", "c4", "ptb", "alpaca", or a .txt, .jsonl or .parquet file.
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
    if source == SELF:
        tokens = _sample(model_folder, model_arguments or {}, tokenizer, num_samples, seqlen, seed, device, progress)
    else:
        # The one place that decides how much built-in text is needed, so that it depends on nothing else.
        enough = BUILT_IN_CHARS_PER_TOKEN * num_samples * seqlen
        text = load_text(source, text_field=text_field, min_chars=enough, progress=progress)
        # verbose=False: the stream is meant to be longer than the model's context.
        stream = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        tokens = _choose_blocks(stream, source, num_samples, seqlen, seed)
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        worst = int(tokens.max()) if int(tokens.max()) >= vocab_size else int(tokens.min())
        raise CalibrationError(
            f"token id {worst} is outside the model's vocabulary of {vocab_size}; tokenizer and model do not "
            "belong together"
        )
    return Calibration(tokens, source, seed, fingerprint(tokens))


def fingerprint(tokens: torch.Tensor) -> str:
    """Return a sha256 of token ids [N, T]."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


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


def _sample(
    model_folder: Path,
    arguments: Mapping[str, Any],
    tokenizer: Any,
    num_samples: int,
    seqlen: int,
    seed: int,
    device: str,
    progress: Progress,
) -> torch.Tensor:
    """Sample from the dense model at temperature 1, ignoring what its generation config prefers.

    The loop is written out, because `generate` draws from the global random state and stops at the end of a
    text; here a sequence simply goes on with the next text.
    """
    from transformers import AutoModelForCausalLM

    place = choose_device(device)
    # Its bar would run into ours.
    with quiet(*(("transformers",) if arguments else ())):
        # The stubs know nothing of output_loading_info, with which a pair is returned.
        auto: Any = AutoModelForCausalLM
        model, info = auto.from_pretrained(
            model_folder,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    if info["missing_keys"]:
        # Names that only our reader knows; transformers fills in random numbers, whose text means nothing.
        raise CalibrationError(
            f"no text can be sampled from {str(model_folder)!r}, because transformers does not know its names of "
            f"tensors (it misses {min(info['missing_keys'])!r}); calibrate on a text instead"
        )
    model = model.to(place).eval()
    generator = torch.Generator().manual_seed(seed)
    start = _first_tokens(tokenizer, model.config.vocab_size, num_samples, generator)  # [N, 1]
    batch = _batch_size(model.config, model.dtype.itemsize, seqlen)
    done: list[torch.Tensor] = []
    with torch.inference_mode(), progress.step("Sampling calibration text", num_samples * seqlen) as advance:
        for first in start.split(batch):
            columns = [first]
            cache = None
            advance(len(first))
            for _ in range(seqlen - 1):
                out = model(columns[-1].to(place), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                scores = out.logits[:, -1].to("cpu", torch.float64)  # [B, V]
                if not torch.isfinite(scores).all():
                    raise NumericalError("the dense model gives NaN or infinite scores, so 'self' cannot sample")
                columns.append(torch.multinomial(scores.softmax(-1), 1, generator=generator))
                advance(len(first))
            done.append(torch.cat(columns, dim=1))
    return torch.cat(done)  # [N, T]


def _first_tokens(tokenizer: Any, vocab_size: int, num_samples: int, generator: torch.Generator) -> torch.Tensor:
    bos = tokenizer.bos_token_id
    if bos is not None:
        return torch.full((num_samples, 1), bos, dtype=torch.int64)
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([i for i in range(min(len(tokenizer), vocab_size)) if i not in special])
    return plain[torch.randint(len(plain), (num_samples, 1), generator=generator)]


def _batch_size(config: Any, itemsize: int, seqlen: int) -> int:
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sequence_bytes = 2 * config.num_hidden_layers * kv_heads * head_dim * seqlen * itemsize
    return max(1, _CACHE_BYTES // sequence_bytes)
