"""The answer to a completion request, put together from the pieces of its texts.

In: pieces, in the order in which they are made. Out: the JSON of a whole answer, or the server-sent events of a streamed one.
Source: OpenAI, "API reference", the completion object; WHATWG HTML, section 9.2, server-sent events.
"""

import codecs
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt.serve.wire import CompletionRequest, dumps, failure
from nanogpt.serve.worker import Job, Made
from nanogpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanogpt.generate import Piece
    from nanogpt.library import Model

NEVER = -9999.0  # the log-probability of a token that training never had: JSON has no infinity


@dataclass(frozen=True)
class Token:
    """A token as `logprobs` tell of it. The first of a prompt is not predicted from anything: it has no log-probability."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Prompt:
    """What is continued: its ids, its text, and its tokens where they are to be told."""

    ids: list[int]
    text: str
    tokens: Sequence[Token] = ()


class Choice:
    """One text of an answer, as it grows."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer, echo: bool, logprobs: int | None):
        self.index, self.made = index, 0
        self.finish: str | None = None
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._new, self._text_end, self._decoded = "", len(prompt.text), 0 if echo else len(prompt.text)
        self._held: list[tuple[Token, int]] = []  # tokens whose first character is not certain yet, each with its place in prompt and text
        if echo:
            self._new = prompt.text
            for token in prompt.tokens:
                self._hold(token)

    def add(self, piece: "Piece") -> None:
        """Put a piece behind the text."""
        self._new += piece.text
        self._text_end += len(piece.text)
        if piece.token is not None:
            self.made += 1
            if self._logprobs is not None:
                self._hold(Token(piece.token, piece.logprob, piece.top))
        if piece.finish is not None:  # to who asked, a text that was cut short for time is one that was cut short
            self.finish = "stop" if piece.finish == "stop" else "length"

    def take(self) -> dict[str, Any] | None:
        """What is new since the last time, in the API's words; None if nothing is."""
        if not self._new and self.finish is None:
            return None
        new, self._new = self._new, ""
        return {"index": self.index, "text": new, "logprobs": self._told() if self._logprobs is not None else None, "finish_reason": self.finish}

    def _hold(self, token: Token) -> None:
        self._held.append((token, self._decoded))
        self._decoded += len(self._decoder.decode(self._tokenizer.token_bytes[token.id]))

    def _told(self) -> dict[str, Any]:
        """The tokens whose text is out; those of a stop string never are."""
        certain = next((i for i, (_, place) in enumerate(self._held) if place >= self._text_end), len(self._held))
        told, self._held = self._held[:certain], self._held[certain:]
        return {
            "tokens": [self._spelled(token.id) for token, _ in told],
            "token_logprobs": [token.logprob for token, _ in told],
            "top_logprobs": [self._alternatives(token) for token, _ in told] if self._logprobs else None,
            "text_offset": [place for _, place in told],
        }

    def _alternatives(self, token: Token) -> dict[str, float] | None:
        """By what is written, likeliest first; of two tokens that are written alike, the likelier."""
        if token.logprob is None:
            return None
        told: dict[str, float] = {}
        for i, logprob in token.top:
            told.setdefault(self._spelled(i), logprob)
        return told

    def _spelled(self, token: int) -> str:
        written = self._tokenizer.token_bytes[token]
        try:
            return written.decode()
        except UnicodeDecodeError:  # part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


class Answer:
    """All texts of a request."""

    def __init__(self, asked: CompletionRequest, prompts: Sequence[Prompt], tokenizer: Tokenizer):
        self.asked, self.prompt_tokens = asked, sum(len(prompt.ids) for prompt in prompts)
        self._about = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()), "model": asked.model}
        each = [prompt for prompt in prompts for _ in range(asked.n)]
        self.choices = [Choice(i, prompt, tokenizer, asked.echo, asked.logprobs) for i, prompt in enumerate(each)]

    async def whole(self, job: Job) -> dict[str, Any]:
        """The answer when all texts have ended."""
        async for made in job.pieces():
            self._add(made)
        return self._about | {"choices": [choice.take() for choice in self.choices], "usage": self._usage()}

    async def events(self, job: Job, first: Made) -> AsyncIterator[bytes]:
        """The server-sent events, those of one delivery together, until [DONE]; `first` was received already."""
        usage = {"usage": None} if self.asked.stream_options.include_usage else {}
        try:
            yield self._news(self._add(first), usage)
            async for made in job.pieces():
                yield self._news(self._add(made), usage)
        except Exception as error:  # the status is sent, and cannot tell any more
            yield _event(failure(error).content())
            return
        if usage:
            yield _event(self._about | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _add(self, made: Made) -> list[Choice]:
        """Take pieces in, and give the texts that they belong to."""
        for index, piece in made:
            self.choices[index].add(piece)
        return [self.choices[index] for index in dict.fromkeys(index for index, _ in made)]

    def _news(self, choices: Sequence[Choice], usage: dict[str, None]) -> bytes:
        taken = [new for choice in choices if (new := choice.take())]
        return b"".join(_event(self._about | {"choices": [new]} | usage) for new in taken)

    def _usage(self) -> dict[str, int]:
        made = sum(choice.made for choice in self.choices)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": made, "total_tokens": self.prompt_tokens + made}


def tokens_of(model: "Model", ids: Sequence[int], n_top: int) -> list[Token]:
    """What the model thinks of each token of a prompt, at most as long as its context; of the tokens that training had, as in `Piece`."""
    logits = model.logits([ids])[0, :-1].astype(np.float64)  # (T - 1, V)
    for first, behind in model.summary["unused"]:
        logits[:, first:behind] = -np.inf
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    told = [Token(ids[0], None, ())]
    for token, row in zip(ids[1:], logprobs, strict=True):
        top = np.argsort(-row, kind="stable")[:n_top]
        told.append(Token(token, float(max(row[token], NEVER)), [(int(i), float(row[i])) for i in top if row[i] > -np.inf]))
    return told


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {dumps(content)}\n\n".encode()
