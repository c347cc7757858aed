"""Many texts at once: they join, advance together by a token a step, and leave.

In: requests. Out: in each step, for every text that is in, what became certain of it (Yu et al. 2022, "Orca", section 3.1: continuous batching).

A text does not depend on what else is there: its random numbers are a function of its seed and the number of the token. One that is alone advances by
several tokens a step where the decoder can draft them, and each is drawn again here, so that it comes out the same. When the context is full, its
last half is read again and the text goes on, which keeps the average cost of a token constant. One thread runs an engine.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from nanogpt.config import SamplingConfig
from nanogpt.errors import UserError
from nanogpt.generate.decoder import Decoder, Drafter
from nanogpt.generate.filters import COLDEST, Sampler, bias, uniforms
from nanogpt.generate.text import Ranges, Spelling
from nanogpt.tokenizer import Tokenizer

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A text to make: the ids it continues (at least one), how, and how many alternatives to name beside each token."""

    prompt: Sequence[int]
    settings: SamplingConfig
    seed: int
    n_top: int = 0


class Text:
    """A text in the making."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.request, self.ids = request, list(request.prompt)
        self.start = 0  # the model sees the ids from here on
        self.row: int | None = None
        self.fresh, self.cancelled = True, False  # fresh: its row does not hold its ids
        self.spelling = Spelling(tokenizer, request.settings.stop)
        self._chances: list[float] = []  # those of all tokens so far, and some more
        self.seen = np.zeros(tokenizer.vocab_size, bool) if request.settings.repetition_penalty != 1 else None
        if self.seen is not None:
            self.seen[self.ids] = True

    @property
    def made(self) -> int:
        """How many tokens were drawn."""
        return len(self.ids) - len(self.request.prompt)

    def chances(self, n: int) -> list[float]:
        """The random numbers that draw the next n tokens."""
        while len(self._chances) < self.made + n:
            first = len(self._chances)
            self._chances += uniforms(self.request.seed, np.arange(first, first + 128)).tolist()
        return self._chances[self.made : self.made + n]

    def cancel(self) -> None:
        """Have it leave at the next step, wherever it stands."""
        self.cancelled = True


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step added to a text: a token, and the text that became certain, which may be empty.

    `logprob`, in nats, and `top`, the likeliest tokens with theirs, are of the model's own distribution, without the tokens that training never had, before
    temperature and filters. A text that ends without another token, since it was cancelled or asked for none, ends with a piece whose token is None.
    """

    of: Text
    text: str
    token: int | None
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)
    finish: Finish | None = None


class Engine:
    """A line of texts that wait, and those that are in: as many as the decoder has rows."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, unused: Ranges = ()):
        """Tokens in `unused` are never drawn."""
        self.decoder, self.tokenizer = decoder, tokenizer
        self.waiting: deque[Text] = deque()
        self.inside: list[Text] = []  # by row, in rising order
        self.drafter = decoder if isinstance(decoder, Drafter) else None
        self.sampler: Sampler | None = None  # of those inside
        self.banned = np.zeros(tokenizer.vocab_size, np.float32)  # added to logits
        for first, behind in unused:
            self.banned[first:behind] = -np.inf

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.inside or self.waiting)

    def add(self, request: Request) -> Text:
        """Put a text into the line. Errors: `UserError` for tokens that are not in the vocabulary, or when none is left to draw."""
        settings, V = request.settings, self.tokenizer.vocab_size
        assert len(request.prompt), "a text continues something"
        if wrong := [token for token in (*request.prompt, *settings.logit_bias, *(settings.allowed or ())) if not 0 <= token < V]:
            raise UserError(f"There is no token {wrong[0]}: the vocabulary goes from 0 to {V - 1}.")
        if settings.allowed is not None and not np.isfinite(self.banned[list(settings.allowed)]).any():
            raise UserError(f"None of the {len(settings.allowed)} allowed tokens occurred in the training text, so there is none to draw.")
        text = Text(request, self.tokenizer)
        self.waiting.append(text)
        return text

    def step(self) -> list[Piece]:
        """Let texts leave that were cancelled, and others in; advance each that is in by one token, or one that is alone by several."""
        pieces = self._turn_away() + self._let_in()
        if not self.inside:
            return pieces
        ahead = self._ahead()
        if ahead > 1:
            texts, chances = self.inside * ahead, self.inside[0].chances(ahead)
            logits, drafted = self._draft(chances)
        else:
            texts, chances = self.inside, [text.chances(1)[0] for text in self.inside]
            logits, drafted = self._logits(), []
        logits += self.banned  # (B, V)
        if self.sampler is None or self.sampler.n != len(texts):
            self.sampler = Sampler([text.request.settings for text in texts], logits.shape[1])
        seen = None
        if self.sampler.penalty is not None:
            nothing = np.zeros(logits.shape[1], bool)
            seen = np.stack([nothing if text.seen is None else text.seen for text in self.inside])
        tokens = self.sampler(logits, chances, seen).tolist()
        logits -= np.maximum.reduce(logits, axis=1, keepdims=True)
        totals = np.log(np.add.reduce(np.exp(logits), axis=1)).tolist()
        for i, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            top = _likeliest(logits[i] - totals[i], text.request.n_top) if text.request.n_top else []
            pieces.append(_advance(text, token, logits.item(i, token) - totals[i], top))
            right = i >= len(drafted) or token == drafted[i]
            if self.drafter is not None and drafted and (pieces[-1].finish or not right):
                self.drafter.take_back(text.row, len(drafted) - i)  # type: ignore[arg-type]
                break
        if ended := {piece.of for piece in pieces if piece.finish}:
            self._keep([text for text in self.inside if text not in ended])
        return pieces

    def _ahead(self) -> int:
        """By how many tokens the next step goes ahead: more than one for a text that is alone in a decoder that drafts, which knows temperatures only."""
        if self.drafter is None or len(self.inside) > 1 or self.inside[0].fresh:
            return 1
        text, settings = self.inside[0], self.inside[0].request.settings
        if (settings.repetition_penalty, settings.top_k, settings.top_p, settings.min_p) != (1, None, 1, 0):
            return 1
        return min(self.drafter.ahead, settings.max_tokens - text.made, self.decoder.context_length - (len(text.ids) - text.start) + 1)

    def _draft(self, chances: Sequence[float]) -> tuple[np.ndarray, list[int]]:
        """The logits of the next tokens of the only text, (T, V), and T - 1 of the tokens, as the decoder drew them."""
        text, settings = self.inside[0], self.inside[0].request.settings
        added = self.banned + bias(settings, len(self.banned))
        assert self.drafter is not None
        assert text.row is not None
        return self.drafter.draft(text.row, text.ids[-1], chances, max(settings.temperature, COLDEST), added)

    def _turn_away(self) -> list[Piece]:
        """Take out those that were cancelled."""
        gone = [text for text in (*self.inside, *self.waiting) if text.cancelled]
        if gone:
            self.waiting = deque(text for text in self.waiting if not text.cancelled)
            self._keep([text for text in self.inside if not text.cancelled])
        return [Piece(text, "", None, 0.0, finish="cancelled") for text in gone]

    def _let_in(self) -> list[Piece]:
        """Give free rows to those that wait, the lowest first, so that those in use lie together; who wants no token has had them all."""
        pieces: list[Piece] = []
        free = sorted(set(range(self.decoder.rows)) - {text.row for text in self.inside}, reverse=True) if self.waiting else []
        while self.waiting and free:
            text = self.waiting.popleft()
            if text.request.settings.max_tokens == 0:
                pieces.append(Piece(text, "", None, 0.0, finish="length"))
                continue
            text.row = free.pop()
            self._keep([*self.inside, text])
        return pieces

    def _keep(self, texts: list[Text]) -> None:
        """Have these inside and no others."""
        self.inside, self.sampler = sorted(texts, key=lambda text: text.row), None  # type: ignore[arg-type, return-value]

    def _logits(self) -> np.ndarray:
        """(B, V), of the next token of each text inside: of one more id, or of all that the model sees where the row does not hold them."""
        context = self.decoder.context_length
        for text in self.inside:
            if len(text.ids) - text.start > context:
                text.start, text.fresh = len(text.ids) - max(1, context // 2), True
        going = [text for text in self.inside if not text.fresh]
        decoded = self.decoder.decode([text.row for text in going], [text.ids[-1] for text in going]) if going else None  # type: ignore[misc]
        if decoded is not None and len(going) == len(self.inside):
            return decoded
        rows = iter(decoded if decoded is not None else ())
        logits = np.stack([self.decoder.prefill(text.row, text.ids[text.start :]) if text.fresh else next(rows) for text in self.inside])  # type: ignore[arg-type]
        for text in self.inside:
            text.fresh = False
        return logits


def _advance(text: Text, token: int, logprob: float, top: list[tuple[int, float]]) -> Piece:
    """Put a token behind a text, and see whether it ends."""
    text.ids.append(token)
    if text.seen is not None:
        text.seen[token] = True
    spelled = text.spelling.add(token)
    if text.spelling.ended:
        return Piece(text, spelled, token, logprob, top, "stop")
    if text.made == text.request.settings.max_tokens:
        return Piece(text, spelled + text.spelling.rest(), token, logprob, top, "length")
    return Piece(text, spelled, token, logprob, top)


def _likeliest(logprobs: np.ndarray, n: int) -> list[tuple[int, float]]:
    """The n likeliest tokens by their logprobs (V,), with these; those that cannot be are left out."""
    order = np.argsort(-logprobs, kind="stable")[:n]
    return [(int(token), float(logprobs[token])) for token in order if logprobs[token] > -np.inf]
