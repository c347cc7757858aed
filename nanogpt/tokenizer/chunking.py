"""Split a text into chunks that can be encoded independently, without changing its tokens.

A safe split is before a space or line end that follows a character that is not white space, if no
token of the vocabulary reaches across. No merge crosses such a position, and the pre-tokenizers of
`trainers`, GPT-2 and Llama always start a new token there. A text that has no safe split for
`MAX_CHUNK_CHARS` characters is split there all the same, counted from the last safe split. Its
tokens thus never depend on how it was read, and memory stays bounded.
"""

import re
from collections.abc import Iterable, Iterator

CHUNK_CHARS = 1 << 13  # characters of an ordinary chunk
MAX_CHUNK_CHARS = 1 << 20  # characters of the longest chunk, and of a batch


def safe_split_pattern(token_texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the white space after each safe split.

    Args:
        token_texts: The text of every token in the vocabulary.
    """
    crossed = {
        text[i]
        for text in token_texts
        for i in range(1, len(text))
        if text[i] in " \n" and not text[i - 1].isspace()
    }
    safe = "".join(sorted({" ", "\n"} - crossed))
    return re.compile(rf"(?<=\S)[{safe}]" if safe else r"(?!)")


def iter_batches(texts: Iterable[str], pattern: re.Pattern[str]) -> Iterator[list[str]]:
    """Iterate over the chunks of a text in batches of about `MAX_CHUNK_CHARS` characters.

    Args:
        texts: The text, divided anywhere.
        pattern: The result of `safe_split_pattern`.
    """
    pending: list[str] = []
    size = 0
    for text in texts:
        pending.append(text)
        size += len(text)
        if size > MAX_CHUNK_CHARS:
            joined = "".join(pending)
            stop = _last_safe_split(joined, pattern)
            stop += (len(joined) - stop - 1) // MAX_CHUNK_CHARS * MAX_CHUNK_CHARS
            yield from group_by_size(_iter_chunks(joined, stop, pattern), MAX_CHUNK_CHARS)
            pending = [joined[stop:]]
            size = len(joined) - stop
    joined = "".join(pending)
    yield from group_by_size(_iter_chunks(joined, len(joined), pattern), MAX_CHUNK_CHARS)


def group_by_size(texts: Iterable[str], min_chars: int) -> Iterator[list[str]]:
    """Group consecutive texts to at least `min_chars` characters; the last group may be smaller."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= min_chars:
            yield group
            group = []
            size = 0
    if group:
        yield group


def _iter_chunks(text: str, stop: int, pattern: re.Pattern[str]) -> Iterator[str]:
    """Iterate over the chunks of `text[:stop]`, where `stop` is a split or the end."""
    start = 0
    while start < stop:
        limit = min(stop, start + MAX_CHUNK_CHARS)
        split = None
        if start + CHUNK_CHARS < limit:
            split = pattern.search(text, start + CHUNK_CHARS, limit + 1)
        # Without a safe split in the rest, an earlier one is better than a split at the limit.
        if split is None and limit < stop:
            split = pattern.search(text, start + 1, limit + 1)
        chunk_stop = split.start() if split else limit
        yield text[start:chunk_stop]
        start = chunk_stop


def _last_safe_split(text: str, pattern: re.Pattern[str]) -> int:
    """Return the position of the last safe split, or 0 if there is none."""
    width = 1024
    while True:
        start = max(1, len(text) - width)
        splits = [match.start() for match in pattern.finditer(text, start)]
        if splits or start == 1:
            return splits[-1] if splits else 0
        width *= 16
