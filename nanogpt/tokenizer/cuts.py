"""Where a text may be cut without changing its tokens.

In: a text, whole or as it comes. Out: pieces that can be encoded by themselves, on all processors: the tokens of the text are those of its pieces.

A place between a character that is not white space and a space or a line end after it is a barrier, where no token of the vocabulary reaches across: no merge
crosses it then, and the pre-tokenizers of `kinds`, GPT-2's and Llama's begin something new at white space, whatever comes before. A text without a barrier
for `LONGEST` characters is cut there all the same, counted from the last barrier, so that its tokens never depend on how it came, and memory is bounded.
"""

import re
from collections.abc import Iterable, Iterator

PIECE = 1 << 13  # characters of an ordinary piece
LONGEST = 1 << 20  # characters of the longest piece, and those that are encoded at a time


def barrier(tokens: Iterable[str]) -> re.Pattern[str]:
    """Where no token of such a vocabulary, given as text, reaches across: a pattern that finds the white space behind such places."""
    across = {token[at] for token in tokens for at in range(1, len(token)) if token[at] in " \n" and not token[at - 1].isspace()}
    white = "".join(sorted({" ", "\n"} - across))
    return re.compile(rf"(?<=\S)[{white}]" if white else r"(?!)")


def batches(chunks: Iterable[str], at: re.Pattern[str]) -> Iterator[list[str]]:
    """The pieces of the text that the chunks make up together, in lists of about `LONGEST` characters."""
    waiting: list[str] = []
    size = 0
    for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk)
        if size > LONGEST:
            text = "".join(waiting)
            end = _last(text, at)
            end += (len(text) - end - 1) // LONGEST * LONGEST
            yield from _grouped(text, end, at)
            waiting, size = [text[end:]], len(text) - end
    text = "".join(waiting)
    yield from _grouped(text, len(text), at)


def _grouped(text: str, end: int, at: re.Pattern[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for piece in _pieces(text, end, at):
        group.append(piece)
        size += len(piece)
        if size >= LONGEST:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pieces(text: str, end: int, at: re.Pattern[str]) -> Iterator[str]:
    """The text up to `end`, where it may be cut or is over."""
    begin = 0
    while begin < end:
        limit = min(end, begin + LONGEST)
        cut = at.search(text, begin + PIECE, limit + 1) if begin + PIECE < limit else None
        if cut is None and limit < end:  # no barrier, or one that is nearer
            cut = at.search(text, begin + 1, limit + 1)
        place = cut.start() if cut else limit
        yield text[begin:place]
        begin = place


def _last(text: str, at: re.Pattern[str]) -> int:
    """The last barrier within a text; 0 if it has none."""
    width = 1024
    while True:
        begin = max(1, len(text) - width)
        places = [cut.start() for cut in at.finditer(text, begin)]
        if places or begin == 1:
            return places[-1] if places else 0
        width *= 16
