"""Text from a model, token by token.

In: a model and what it is to continue. Out: tokens, or pieces of text as soon as they are certain.

Each new token is drawn from the softmax of the logits after a chain of small filters, by a generator that belongs to this
sequence alone: same seed, same text. When the context is full, its last half is read again and the text goes on.
"""

import codecs
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby

import numpy as np
import torch
from torch import Tensor

from nanogpt.config import SamplingConfig
from nanogpt.errors import Notice, UserError
from nanogpt.machine import Machine
from nanogpt.model import GPT, KVCache
from nanogpt.tokenizer import Tokenizer

COLDEST = 1e-4  # dividing logits by less overflows; the likeliest token has all the probability long before
Ranges = Sequence[Sequence[int]]  # of token ids: [first, behind the last] pairs


def top_k(logits: Tensor, k: int) -> Tensor:
    """logits (V,) with all but the k largest at -inf; of equals the first ones stay, so that k are left."""
    kept = torch.full_like(logits, -torch.inf)
    places = logits.sort(descending=True, stable=True).indices[:k]
    return kept.index_copy(0, places, logits[places])


def top_p(logits: Tensor, p: float) -> Tensor:
    """logits (V,) with -inf outside the nucleus: the fewest likeliest tokens that reach probability p (Holtzman et al. 2020, section 3.1)."""
    values, places = logits.sort(descending=True, stable=True)
    probabilities = values.softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities  # the likeliest has 0 before it and always stays
    return logits.index_fill(0, places[before >= p], -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """logits (V,) with -inf for tokens less than p times as likely as the likeliest (Nguyen et al. 2024, section 3)."""
    probabilities = logits.softmax(dim=0)
    return logits.masked_fill(probabilities < p * probabilities.max(), -torch.inf)


def pick(logits: Tensor, settings: SamplingConfig, generator: torch.Generator) -> int:
    """Draw one token from logits (V,) after the filters that the settings ask for, in the order of the settings."""
    if settings.temperature < COLDEST:
        return int(logits.argmax())
    logits = logits / settings.temperature
    if settings.top_k is not None:
        logits = top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = top_p(logits, settings.top_p)
    if settings.min_p > 0:
        logits = min_p(logits, settings.min_p)
    return int(torch.multinomial(logits.softmax(dim=0), 1, generator=generator))


@torch.inference_mode()
def tokens(model: GPT, prompt: Sequence[int], settings: SamplingConfig, seed: int, machine: Machine, unused: Ranges = (), cached: bool = True) -> Iterator[int]:
    """Continue `prompt` (at least one id) by up to `max_tokens` ids; those in `unused` are never drawn.

    The model sees the ids since `start`. When they outgrow the context, `start` moves so that half a context is left, which
    keeps the average cost of a token constant. `cached=False` reads them all again for every token: slow, and equal up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    banned = torch.zeros(model.vocab_size, dtype=torch.bool)
    for first, behind in unused:
        banned[first:behind] = True
    ids, start, context = list(prompt), 0, model.config.context_length
    cache = None
    for _ in range(settings.max_tokens):
        if len(ids) - start > context:
            start, cache = len(ids) - max(1, context // 2), None
        if cache is None:
            cache = KVCache(model.config, 1, machine.device, machine.dtype) if cached else None
            new = ids[start:]
        else:
            new = ids[-1:]
        with machine.autocast():
            logits = model.next_logits(torch.tensor([new], device=machine.device), cache)
        ids.append(pick(logits[0].float().cpu().masked_fill(banned, -torch.inf), settings, generator))
        yield ids[-1]


def text(tokenizer: Tokenizer, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """Turn tokens into pieces of text as they come. A character of several tokens is one piece; it ends at the document's end.

    With `stop`, the text ends before the first of these strings; what could still become one is held back.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    for token in ids:
        if token == tokenizer.end:
            break
        held += decoder.decode(tokenizer.token_bytes[token])
        ends = [(at + len(string), at) for string in stop if (at := held.find(string)) >= 0]
        if ends:  # the string that is complete first counts, however many of them a token completes
            yield from filter(None, [held[: min(ends)[1]]])
            return
        safe = len(held) - max((_overlap(held, string) for string in stop), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    yield from filter(None, [held + decoder.decode(b"", final=True)])


def _overlap(held: str, string: str) -> int:
    """How many of the last characters of `held` begin `string`."""
    return next((n for n in range(min(len(held), len(string) - 1), 0, -1) if held.endswith(string[:n])), 0)


def encode_prompt(tokenizer: Tokenizer, prompt: str | None, unused: Ranges, context_length: int, strict: bool = False) -> list[int]:
    """The ids a model starts from; without a prompt, the token that begins a text.

    Warns of an empty prompt, of one longer than the context, and of what the model never saw, which with `strict` are a `UserError`.
    """
    ids = tokenizer.encode(prompt or "")
    if unknown := tokenizer.unknown(prompt or "") or _unlearned(tokenizer, prompt or "", ids, unused):
        named = ", ".join(f"{_named(string)} at position {at}" for at, string in unknown[:5]) + (", …" if len(unknown) > 5 else "")
        what = f"The training text had no {named}."
        if strict:
            raise UserError(what, "Leave it out of the prompt, or leave out --strict and it is spelled by its bytes.")
        warnings.warn(f"{what} Its tokens are such that the model never learned: expect nonsense near it.", Notice, stacklevel=2)
    if len(ids) > context_length:
        kept = max(1, context_length // 2)
        warnings.warn(f"The prompt has {len(ids):,} tokens and the model looks back on {context_length:,}: only the last {kept:,} count.", Notice, stacklevel=2)
    if not ids:
        ids = [_start(tokenizer, unused)]
        if prompt is not None:
            warnings.warn(f"The prompt is empty: the text starts after {tokenizer.decode(ids)!r}.", Notice, stacklevel=2)
    return ids


def _unlearned(tokenizer: Tokenizer, prompt: str, ids: Sequence[int], unused: Ranges) -> list[tuple[int, str]]:
    """The parts of a prompt whose tokens are `unused`, in whole characters, each with its position; a byte that occurred in other characters is learned."""
    if not ids:
        return []
    new = [any(first <= i < behind for first, behind in unused) for i in ids]
    of_bytes = np.repeat(new, [len(tokenizer.token_bytes[i]) for i in ids])
    starts = [0, *accumulate(len(letter.encode()) for letter in prompt[:-1])]
    strange = np.logical_or.reduceat(of_bytes, starts)
    runs = [list(run) for is_strange, run in groupby(enumerate(prompt), lambda letter: strange[letter[0]]) if is_strange]
    return [(run[0][0], "".join(letter for _, letter in run)) for run in runs]


def _named(string: str) -> str:
    return f"{string!r} (U+{ord(string):04X})" if len(string) == 1 else repr(string)


def _start(tokenizer: Tokenizer, unused: Ranges) -> int:
    """What a text begins after: the end of another, if the model has seen one; else a new line, a space, or whatever it has seen."""
    candidates = [tokenizer.end, *tokenizer.encode("\n "), *range(tokenizer.vocab_size)]
    return next(token for token in candidates if not any(first <= token < behind for first, behind in unused))
