"""Text to the ids a model starts from, and the tokens it makes back to text, piece by piece.

In: a prompt; tokens one at a time. Out: ids; pieces of text as soon as they are certain, never half a character and nothing of what ends the text.
"""

import codecs
import warnings
from collections.abc import Sequence
from itertools import accumulate, groupby

import numpy as np

from nanogpt.errors import Notice, UserError
from nanogpt.tokenizer import Tokenizer

Ranges = Sequence[Sequence[int]]  # of token ids: [first, behind the last] pairs


class Spelling:
    """The text of tokens as they come. A character of several tokens is one piece; the text ends at the document's end.

    With `stop`, the text ends before the first of these strings; what could still become one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.bytes, self.end, self.stop = tokenizer.token_bytes, tokenizer.end, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.ended = "", False

    def add(self, token: int) -> str:
        """What became certain with this token; afterwards `ended` tells whether the text is over."""
        if token == self.end:
            self.ended = True
            return self.rest()
        new = self.decoder.decode(self.bytes[token])
        if not self.stop:
            return new
        self.held += new
        ends = [(at + len(string), at) for string in self.stop if (at := self.held.find(string)) >= 0]
        if ends:  # the string that is complete first counts, however many of them a token completes
            self.ended = True
            return self.held[: min(ends)[1]]
        safe = len(self.held) - max(_overlap(self.held, string) for string in self.stop)
        certain, self.held = self.held[:safe], self.held[safe:]
        return certain

    def rest(self) -> str:
        """What was held back, if no token follows."""
        return self.held + self.decoder.decode(b"", final=True)


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
