"""Prompts to token ids, with a warning for tokens that the model has not seen in training."""

import warnings
from collections.abc import Sequence
from itertools import accumulate, groupby

import numpy as np

from nanogpt.errors import Notice, UserError
from nanogpt.tokenizer.tokenizer import Tokenizer

TokenRanges = Sequence[Sequence[int]]  # half-open [start, stop) ranges of token ids

MAX_LISTED_SPANS = 5


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | None,
    unseen_tokens: TokenRanges,
    context_length: int,
    error_on_unknown: bool = False,
) -> list[int]:
    """Return the token ids of a prompt, at least one.

    Warns if the prompt is empty, exceeds the context, or contains tokens unseen in training.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt, or None to start a new text.
        unseen_tokens: Tokens that never occurred in training.
        context_length: The model's context length in tokens.
        error_on_unknown: Raise instead of warning if the prompt contains unseen tokens.

    Raises:
        UserError: The prompt contains unseen tokens and `error_on_unknown` is set.
    """
    text = prompt or ""
    ids = tokenizer.encode(text)
    spans = tokenizer.unknown_chars(text) or unseen_spans(tokenizer, text, ids, unseen_tokens)
    if spans:
        listed = [f"{_describe(span)} at position {i}" for i, span in spans[:MAX_LISTED_SPANS]]
        names = ", ".join(listed) + (", …" if len(spans) > MAX_LISTED_SPANS else "")
        what = f"The training text had no {names}."
        if error_on_unknown:
            raise UserError(what, "Remove these characters from the prompt.")
        _warn(f"{what} The model has not seen their tokens; output near them will be poor.")
    if len(ids) > context_length:
        tail_length = max(1, context_length // 2)
        _warn(
            f"The prompt has {len(ids):,} tokens (limit {context_length:,}, the context length): "
            f"only the last {tail_length:,} count."
        )
    if not ids:
        ids = [start_token(tokenizer, unseen_tokens)]
        if prompt is not None:
            _warn(f"The prompt is empty: the text starts after {tokenizer.decode(ids)!r}.")
    return ids


def unseen_spans(
    tokenizer: Tokenizer, prompt: str, ids: Sequence[int], unseen_tokens: TokenRanges
) -> list[tuple[int, str]]:
    """Return the spans of a prompt that are encoded by unseen tokens, with their positions.

    Spans are whole characters: one is unseen if any token of its bytes is.
    """
    if not ids:
        return []
    token_is_unseen = [_contains(unseen_tokens, token) for token in ids]
    byte_is_unseen = np.repeat(token_is_unseen, [len(tokenizer.token_bytes[i]) for i in ids])
    char_starts = [0, *accumulate(len(char.encode()) for char in prompt[:-1])]
    is_unseen = np.logical_or.reduceat(byte_is_unseen, char_starts)
    runs = groupby(enumerate(prompt), lambda item: is_unseen[item[0]])
    spans = [list(run) for run_is_unseen, run in runs if run_is_unseen]
    return [(span[0][0], "".join(char for _, char in span)) for span in spans]


def start_token(tokenizer: Tokenizer, unseen_tokens: TokenRanges) -> int:
    """Return the token to start from without a prompt.

    It is the end-of-text token if the model has seen it, else a newline, a space, or the first
    token that the model has seen.
    """
    candidates = [tokenizer.eot_id, *tokenizer.encode("\n "), *range(tokenizer.vocab_size)]
    return next(token for token in candidates if not _contains(unseen_tokens, token))


def _contains(ranges: TokenRanges, token: int) -> bool:
    return any(start <= token < stop for start, stop in ranges)


def _describe(span: str) -> str:
    return f"{span!r} (U+{ord(span):04X})" if len(span) == 1 else repr(span)


def _warn(message: str) -> None:
    warnings.warn(message, Notice, stacklevel=3)
