"""Calibration text written by the dense model itself.

A row is a chain of documents, as in the training of a model: each one starts from a seed of `seeds.json` (or from the
first token of a text), goes on until the model ends it or its length is used up, and the next one follows. Seeds,
temperatures and lengths are drawn for each row by itself, so that a row depends on nothing but the model, the kinds,
the seed and its number.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from intraslice.border import foreign
from intraslice.data.encoding import as_conversation, encode
from intraslice.data.sampled_rows import SampledRows
from intraslice.data.text import SELF, SELF_KINDS, START
from intraslice.errors import CalibrationError, NumericalError
from intraslice.placement import choose_device, for_float64, memory_bytes
from intraslice.progress import Progress
from intraslice.quiet import quiet
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT

SAMPLING_VERSION = 2
"""Part of what decides the tokens: raise it when other tokens come out."""

CHAT = "chat"
_TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1)
_LENGTHS = (256, 512, 1024)
# Memory for the key/value cache; decides how many rows grow side by side.
_CACHE_BYTES = 1 << 30
# The same on an accelerator with four times as much; a step takes it hardly longer for many rows than for one.
_MAX_CACHE_BYTES = 8 << 30


@dataclass(frozen=True)
class _Document:
    """What is asked of the model.

    Attributes:
        seed: token ids that it starts with.
        temperature: of the sampling.
        length: tokens after the seed, at most; None goes on to the end of the row, also past the end of a text.
    """

    seed: list[int]
    temperature: float
    length: int | None


def sample(
    model_folder: Path,
    model_arguments: Mapping[str, Any],
    tokenizer: Any,
    sources: Sequence[str],
    seqlen: int,
    seed: int,
    device: str,
    progress: Progress,
    folder: Path | None = None,
) -> torch.Tensor:
    """Return one row of tokens for each source, sampled from the dense model where they are not kept on disk.

    The loop is written out, because `generate` draws from the global random state, stops at the end of a text and
    cannot be handed the next seed.

    Args:
        model_folder: folder of the dense model.
        model_arguments: what `from_pretrained` needs besides, where the model is the text tower of a composite one.
        tokenizer: the one that belongs to it.
        sources: "self" for documents of all kinds, or "self-" and a kind, for each row.
        seqlen: T.
        seed: decides everything that is drawn.
        device: "auto", "cpu" or a torch device.
        progress: shows the sampling.
        folder: keeps each batch of rows as soon as it is sampled; None keeps nothing.

    Returns:
        int64 [N, T].

    Raises:
        CalibrationError: the model cannot be sampled from, or has no chat template that "self-chat" asks for.
        NumericalError: the model gives NaN.
    """
    place = choose_device(device)
    decides = (SAMPLING_VERSION, seqlen, seed, place.type, tokenizer.chat_template, len(tokenizer))
    kept = SampledRows(folder, decides, sources)
    found: list[torch.Tensor] = []
    while (done := sum(map(len, found))) < len(sources) and (batch := kept.read(done)) is not None:
        found.append(batch)
    if done == len(sources):
        return torch.cat(found)
    model = _load(model_folder, model_arguments, place)
    ends = _ends(model, tokenizer, model.config.vocab_size)
    seeds = _Seeds(tokenizer, model.config.vocab_size, ends)
    # All of them before the first is sampled: what cannot be asked for is refused at once.
    rows = [
        _Row(seeds.documents(sources[number], seed, number), ends, seqlen, f"{seed} {number}")
        for number in range(done, len(sources))
    ]
    size = _batch_size(model.config, model.dtype.itemsize, seqlen, place)
    with progress.step("Sampling calibration text", len(rows) * seqlen) as advance:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = kept.read(done + start)
            if batch is None or len(batch) != len(part):
                batch = _sample_batch(model, part, seqlen, advance)
                kept.write(done + start, batch, size)
            else:
                advance(batch.numel())
            found.append(batch)
    return torch.cat(found)  # [N, T]


def _sample_batch(model: Any, rows: Sequence[_Row], seqlen: int, advance: Callable[[int], None]) -> torch.Tensor:
    """Let rows grow side by side, and return them, int64 [B, T]."""
    draws = torch.tensor([row.draws for row in rows], dtype=torch.float64)  # [B, T]
    cache = _cache(model.config, seqlen)
    with torch.inference_mode():
        tokens = torch.tensor([row.first() for row in rows])  # [B]
        advance(len(rows))
        for column in range(1, seqlen):
            logits = model(tokens[:, None].to(model.device), **{CACHE_ARGUMENT: cache}, use_cache=True).logits[:, -1]
            temperatures = torch.tensor([row.temperature for row in rows], device=logits.device)
            sampled = _draw(logits / temperatures[:, None], draws[:, column])
            tokens = torch.tensor([row.next(token) for row, token in zip(rows, sampled, strict=True)])
            advance(len(rows))
    return torch.tensor([row.tokens for row in rows])


class _Row:
    """The tokens of one row as they come, and what the model is to continue.

    Args:
        documents: without an end.
        ends: token ids that end a text.
        seqlen: T.
        seed: of the numbers in [0, 1) that the tokens are drawn by.
    """

    def __init__(self, documents: Iterator[_Document], ends: Sequence[int], seqlen: int, seed: str):
        drawn = random.Random(seed)
        self.draws = [drawn.random() for _ in range(seqlen)]
        self.tokens: list[int] = []
        self._documents = documents
        self._ends = ends
        # In rows shorter than a seed, something has to be left for the model to say.
        self._longest_seed = max(1, seqlen // 2)
        self._forced: deque[int] = deque()
        self._begin()

    def _begin(self) -> None:
        document = next(self._documents)
        self._forced.extend(document.seed[: self._longest_seed])
        self.temperature = document.temperature
        self._left = document.length

    def first(self) -> int:
        """Return the first token."""
        return self.next(0)

    def next(self, sampled: int) -> int:
        """Return the next token: of the seed, as far as there is one, else the one that was sampled."""
        if self._forced:
            token = self._forced.popleft()
        else:
            token = sampled
            if self._left is not None:
                self._left -= 1
                ended = token in self._ends
                if ended or self._left == 0:
                    if not ended:
                        self._forced.extend(self._ends[:1])
                    self._begin()
        self.tokens.append(token)
        return token


class _Seeds:
    """Seeds as token ids.

    Args:
        tokenizer: of the model.
        vocab_size: token ids are below this.
        ends: token ids that end a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Sequence[int]):
        self._tokenizer = tokenizer
        self._texts: dict[str, list[str]] = json.loads(
            (files("intraslice.data") / "seeds.json").read_text(encoding="utf-8")
        )
        special = set(tokenizer.all_special_ids)
        self._plain = [token for token in range(min(len(tokenizer), vocab_size)) if token not in special]
        self._vocab_size = vocab_size
        self._ends = ends

    def documents(self, source: str, seed: int, number: int) -> Iterator[_Document]:
        """Yield documents of a source without end, for one row."""
        kinds = [kind for kind in SELF_KINDS if kind != CHAT or self._tokenizer.chat_template]
        if source != SELF:
            kinds = [source.removeprefix(f"{SELF}-")]
        if kinds == [CHAT] and not self._tokenizer.chat_template:
            raise CalibrationError(
                f"{source!r} needs a chat template, and the tokenizer of this model has none; use 'self'"
            )
        drawn = random.Random(f"{source} {seed} {number}")
        # Neighbouring rows start with other kinds and temperatures.
        place = number
        while True:
            kind = kinds[place % len(kinds)]
            temperature = _TEMPERATURES[(place + place // len(kinds)) % len(_TEMPERATURES)]
            place += 1
            if kind == START:
                # What the model would say by itself: unchanged probabilities, and all of it when nothing else is asked.
                length = None if source != SELF else drawn.choice(_LENGTHS)
                yield _Document([self._first(drawn)], 1.0, length)
            else:
                yield _Document(self._tokens(kind, drawn), temperature, drawn.choice(_LENGTHS))

    def _first(self, drawn: random.Random) -> int:
        bos = self._tokenizer.bos_token_id
        return drawn.choice(self._plain) if bos is None else bos

    def _tokens(self, kind: str, drawn: random.Random) -> list[int]:
        text = drawn.choice(self._texts[kind])
        if kind == CHAT:
            said = [{"role": "user", "content": text}]
            text = as_conversation(said, self._tokenizer, prompt=True)
        tokens = encode(text, self._tokenizer, special=kind != CHAT)
        if max(tokens, default=0) >= self._vocab_size:
            raise CalibrationError(
                f"token id {max(tokens)} is outside the vocabulary of {self._vocab_size}; the tokenizer does not "
                "belong to the model."
            )
        while len(tokens) > 1 and tokens[-1] in self._ends:
            tokens = tokens[:-1]
        return tokens


def _load(model_folder: Path, arguments: Mapping[str, Any], place: torch.device) -> Any:
    # Its bar would run into ours. What else lies beside the model, such as generation_config.json, is read only here.
    no_text = f"no text can be sampled from {str(model_folder)!r}"
    with foreign(no_text, CalibrationError), quiet(*(("transformers",) if arguments else ())):
        # The stubs know nothing of output_loading_info, with which a pair is returned.
        auto: Any = AutoModelForCausalLM
        model, info = auto.from_pretrained(
            model_folder, dtype="auto", use_safetensors=True, output_loading_info=True, **arguments
        )
    if info["missing_keys"]:
        # Names that only our reader knows; transformers fills in random numbers, whose text means nothing.
        raise CalibrationError(
            f"{no_text}, because transformers does not know its names of tensors (it misses "
            f"{min(info['missing_keys'])!r}); calibrate on a text instead"
        )
    return model.to(place).eval()


def _ends(model: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    """Return the token ids below `vocab_size` that end a text, that of the tokenizer first."""
    found = [tokenizer.eos_token_id]
    for config in (model.generation_config, model.config):
        value = getattr(config, "eos_token_id", None)
        found.extend(value if isinstance(value, list) else [value])
    # A file beside the model may say anything.
    return list(dict.fromkeys(token for token in found if isinstance(token, int) and 0 <= token < vocab_size))


def _draw(logits: torch.Tensor, uniform: torch.Tensor) -> list[int]:
    """Return one token id for each row of logits [B, V], by numbers in [0, 1), [B]."""
    sums = for_float64(logits.float().softmax(-1)).to(torch.float64).cumsum(-1)  # [B, V]
    if not torch.isfinite(sums[:, -1]).all():
        raise NumericalError("the dense model gives NaN or infinite scores, so 'self' cannot sample")
    # right: a token of probability 0 is never the first one above the number.
    chosen = torch.searchsorted(sums, (uniform.to(sums.device) * sums[:, -1])[:, None], right=True)
    return chosen[:, 0].clamp(max=logits.shape[1] - 1).tolist()


def _cache(config: Any, seqlen: int) -> DynamicCache:
    """Return an empty cache whose whole layers are allocated once; transformers' own copies all of it at each token."""
    cache = DynamicCache(config=config)
    cache.layers = [_WholeLayer(seqlen) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _WholeLayer(DynamicLayer):
    """Keys and values of one layer in tensors that are as long as they will become.

    Args:
        seqlen: T.
    """

    def __init__(self, seqlen: int):
        super().__init__()
        self._seqlen = seqlen
        self._used = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all_keys, self._all_values = (
                states.new_empty(*states.shape[:2], self._seqlen, states.shape[3])
                for states in (key_states, value_states)
            )
        end = self._used + key_states.shape[2]
        self._all_keys[:, :, self._used : end] = key_states
        self._all_values[:, :, self._used : end] = value_states
        self._used = end
        # Views; the length that transformers asks for is theirs.
        self.keys, self.values = self._all_keys[:, :, :end], self._all_values[:, :, :end]
        return self.keys, self.values


def sampling_bytes(
    config: Any, num_parameters: int, itemsize: int, num_rows: int, seqlen: int, place: torch.device
) -> int:
    """Estimate the memory that sampling takes: the whole dense model, and the keys and values of the rows of one batch.

    Args:
        config: of the model.
        num_parameters: of the model.
        itemsize: bytes of a stored number.
        num_rows: rows to sample.
        seqlen: T.
        place: where the model samples.
    """
    rows = min(num_rows, _batch_size(config, itemsize, seqlen, place))
    return num_parameters * itemsize + rows * _row_bytes(config, itemsize, seqlen)


def _batch_size(config: Any, itemsize: int, seqlen: int, place: torch.device) -> int:
    room = min(max(_CACHE_BYTES, (memory_bytes(place) or 0) // 4), _MAX_CACHE_BYTES)
    return max(1, room // _row_bytes(config, itemsize, seqlen))


def _row_bytes(config: Any, itemsize: int, seqlen: int) -> int:
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * seqlen * itemsize
