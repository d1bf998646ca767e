"""Decoding: one token after the other, with the keys and values of those before kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modelyard.config.architecture import Architecture
from modelyard.errors import UserError
from modelyard.model.cache import KeyValueCache
from modelyard.model.decoder import Decoder
from modelyard.model.init import key


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, and how many there may be."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens; None for all."""
    top_p: float | None = None
    """Only the smallest set of likeliest tokens that together have this probability, after `top_k`; None for all."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError with everything that is out of range."""
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not self.temperature >= 0:
            problems.append(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if problems:
            raise UserError(*problems)


class Speaker(Protocol):
    """A model that `generate` can ask for the next token, wherever it is."""

    architecture: Architecture

    def start(self) -> Callable[[Sequence[int]], Tensor]:
        """Begin a text; what it returns takes the tokens that follow those so far and gives the logits after them."""
        ...

    def settle(self, token: int) -> int:
        """The token that is taken; several processes that compute one text take the same."""
        ...


class Alone:
    """A decoder that is all here."""

    def __init__(self, model: Decoder):
        self._model, self.architecture = model, model.architecture

    def start(self) -> Callable[[Sequence[int]], Tensor]:
        cache = KeyValueCache(self.architecture)
        return lambda tokens: next_logits(self._model, tokens, cache)

    def settle(self, token: int) -> int:
        return token


def generate(
    model: Decoder | Speaker,
    prompt_ids: Sequence[int],
    options: SamplingOptions,
    *,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield new token ids as they are made; a token of `stop_ids` is yielded too and ends the text.

    The draws are a function of (seed, number of the new token), on any device. Where positions are learned the text
    ends with the last of them. Raises UserError for an empty prompt, for one that is longer than that, and for ids that
    the model does not have.
    """
    speaker = Alone(model) if isinstance(model, Decoder) else model
    vocabulary = model.architecture.vocab_size
    if not prompt_ids:
        raise UserError("generation needs at least one token to start from")
    if not (min(prompt_ids) >= 0 and max(prompt_ids) < vocabulary):
        raise UserError(
            f"the prompt has token {max(prompt_ids)}, the model's vocabulary ends at {vocabulary - 1}"
        )
    room = options.max_new_tokens
    if (positions := model.architecture.position_embeddings) is not None:
        if len(prompt_ids) > positions:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens, the model {positions} learned positions"
            )
        room = min(room, positions - len(prompt_ids) + 1)  # the last token is never read
    read = speaker.start()
    generator = torch.Generator().manual_seed(key(options.seed, "generate"))
    tokens = list(prompt_ids)
    for _ in range(room):
        token = speaker.settle(choose(read(tokens), options, generator))
        yield token
        if token in stop_ids:
            return
        tokens = [token]


@torch.no_grad()
def next_logits(model: Decoder, tokens: Sequence[int], cache: KeyValueCache) -> Tensor:
    """Logits [vocabulary] after `tokens`, which continue what the cache holds and are added to it."""
    device = model.output_weight.device
    ids = torch.tensor([list(tokens)], device=device)
    positions = torch.arange(cache.length, cache.length + len(tokens), device=device)[None]
    boundaries = torch.tensor([[0, len(tokens)]], dtype=torch.int32)
    hidden = model(ids, positions, boundaries, cache)
    return model.logits(hidden[0, -1:])[0]


def choose(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """The next token from logits [vocabulary]; drawn on the CPU, so that a seed means the same on every device."""
    if options.temperature == 0:
        return int(logits.argmax())
    logits = logits.to("cpu", torch.float32) / options.temperature
    if options.top_k is not None and options.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[-1], float("-inf"))
    if options.top_p is not None and options.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= options.top_p  # the set is complete before this token
        logits = logits.index_fill(0, order[beyond], float("-inf"))
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
