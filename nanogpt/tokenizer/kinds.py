"""The kinds of tokenizers, each made from a text.

In: a text in pieces, read once, where the tokenizer depends on it. Out: a `tokenizers.Tokenizer` in one of the forms of `exact`.
Refuses: a vocabulary that is larger than the text supports, or too small for all bytes.

char: each character of the text is a token, any other is spelled by the 256 tokens of bytes. byte: the 256 bytes. word: words, and single signs and white
space between them; a word that has no token is spelled by its characters, those by bytes. bpe: byte-level byte pair encoding (Sennrich et al. 2016; Radford
et al. 2019, section 2.2). All have one token more: the end of a document, an ordinary entry that no text can reach, because it is longer than a character
and no merge, and no word, is spelled like it.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanogpt.errors import Notice, UserError
from nanogpt.tokenizer.exact import BYTES, END, LETTERS

CODE_POINTS = 0x110000
SAMPLE_BYTES = 100_000_000  # of a larger text, so much is enough to choose a vocabulary by
BLOCK = 1 << 16  # characters that a sample takes at a time
FEWEST, MOST = 512, 32_768  # tokens of a vocabulary whose size nobody chose
WORDS = tokenizers.Regex(r"\w+|\s|[^\w\s]")


def char(chunks: Iterable[str], vocab_size: int | None = None, n_bytes: int | None = None) -> tokenizers.Tokenizer:
    """Every character that occurs, in code point order; then the bytes; then the end."""
    seen = np.zeros(CODE_POINTS, bool)
    for chunk in chunks:
        seen[np.frombuffer(chunk.encode("utf-32-le"), np.uint32)] = True
    return _with_fallback([chr(point) for point in np.flatnonzero(seen)])


def byte(chunks: Iterable[str], vocab_size: int | None = None, n_bytes: int | None = None) -> tokenizers.Tokenizer:
    """The 256 bytes by their values; then the end. The same for every text."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*LETTERS, END])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def word(chunks: Iterable[str], vocab_size: int | None = None, n_bytes: int | None = None) -> tokenizers.Tokenizer:
    """The characters of the text and its words, the most frequent first where there is no room for all; then the bytes; then the end."""
    blocks, total = _sample("word", chunks, n_bytes)
    room = (vocab_size or suggested_size(16 * total)) - len(BYTES) - 1  # four times as many: a word is not put together of parts
    _require_room(room)
    points = np.zeros(CODE_POINTS, np.int64)
    for block in blocks:
        counts = np.bincount(np.frombuffer(block.decode().encode("utf-32-le"), np.uint32))
        points[: len(counts)] += counts
    by_frequency = np.argsort(-points, kind="stable")[: min(room, np.count_nonzero(points))]
    letters = [chr(point) for point in np.sort(by_frequency)]
    counter = tokenizers.Tokenizer(models.WordLevel())
    counter.pre_tokenizer = pre_tokenizers.Split(WORDS, "isolated")
    counting = trainers.WordLevelTrainer(vocab_size=room + len(letters), min_frequency=2, show_progress=False)  # single characters count as words here
    counter.train_from_iterator(map(bytes.decode, blocks), counting)
    ranked = sorted(counter.get_vocab().items(), key=lambda item: item[1])
    units = letters + [name for name, _ in ranked if len(name) > 1][: room - len(letters)]
    _require_support(vocab_size, len(units) + len(BYTES) + 1, "words that occur at least twice, characters and bytes")
    backend = _with_fallback(units, ignore_merges=True)
    backend.pre_tokenizer = pre_tokenizers.Split(WORDS, "isolated")
    return backend


def bpe(chunks: Iterable[str], vocab_size: int | None = None, n_bytes: int | None = None) -> tokenizers.Tokenizer:
    """The 256 bytes, then what merging the most frequent pairs gives; then the end. No token is made of what occurs only once."""
    blocks, total = _sample("bpe", chunks, n_bytes)
    wanted = vocab_size or suggested_size(total)
    _require_room(wanted - len(BYTES) - 1)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    merging = trainers.BpeTrainer(vocab_size=wanted - 1, min_frequency=2, initial_alphabet=LETTERS, show_progress=False)
    backend.train_from_iterator(map(bytes.decode, blocks), merging)
    found = backend.get_vocab_size() + 1
    _require_support(vocab_size, found, "pairs that occur at least twice, and bytes")
    spec = json.loads(backend.to_str())
    spec["model"]["vocab"][END] = found - 1
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


KINDS: dict[str, Callable[[Iterable[str], int | None, int | None], tokenizers.Tokenizer]] = {"char": char, "byte": byte, "word": word, "bpe": bpe}
SIZED = ("word", "bpe")  # those whose vocabulary may have any size


def suggested_size(n_bytes: int) -> int:
    """A vocabulary's size for a text of so many bytes: their square root, to the nearest power of two, from 512 to 32,768.

    The number of different words grows about with the square root of a text (Heaps' law; Manning et al. 2008, section 5.1.1), and so does that of the words
    that occur ten times, as a token should to be learned. So 1 MB gets 1,024 and 100 MB 8,192; what is rarer is better spelled.
    """
    return min(MOST, max(FEWEST, 2 ** round(math.log2(max(1, n_bytes)) / 2)))


def _with_fallback(units: list[str], ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """Tokens for these units, for all bytes, and for the end of a document."""
    vocabulary = units + BYTES + [END]
    model = models.BPE(vocab={name: i for i, name in enumerate(vocabulary)}, merges=[], byte_fallback=True, ignore_merges=ignore_merges)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _sample(kind: str, chunks: Iterable[str], n_bytes: int | None) -> tuple[list[bytes], int]:
    """The text, or of a large one blocks of UTF-8 spread evenly over it, `SAMPLE_BYTES` and a block at most; and the size of the whole text in bytes.

    Every so manieth block is taken; when they become too many, every second of them is dropped. Where the size `n_bytes` is known
    beforehand, that never happens, and the sample is as large as it may be.
    """
    taken: list[bytes] = []
    size, total, stride = 0, 0, max(1, math.ceil((n_bytes or 0) / SAMPLE_BYTES))
    for number, block in enumerate(_blocks(chunks)):
        utf8 = block.encode()
        total += len(utf8)
        if number % stride == 0:
            taken.append(utf8)
            size += len(utf8)
        if size > SAMPLE_BYTES + 4 * BLOCK:  # a stride gives up to one block more than its share
            taken, stride = taken[::2], 2 * stride
            size = sum(map(len, taken))
    if size < total:
        what = f"The vocabulary of {kind} tokens is chosen by a sample, {size / 1e6:,.1f} of {total / 1e6:,.1f} MB, spread evenly over the text."
        warnings.warn(what, Notice, stacklevel=2)
    return taken, total


def _blocks(chunks: Iterable[str]) -> Iterator[str]:
    """The text cut after every `BLOCK` characters, however it comes."""
    held = ""
    for chunk in chunks:
        held += chunk
        whole = len(held) // BLOCK * BLOCK
        yield from (held[at : at + BLOCK] for at in range(0, whole, BLOCK))
        held = held[whole:]
    if held:
        yield held


def _require_room(room: int) -> None:
    if room < 1:
        fewest = len(BYTES) + 2
        raise UserError(f"A vocabulary of {fewest - 1 + room:,} tokens is too small: the 256 bytes and the end of a document are {fewest - 1}.",
                        f"Use --vocab-size {fewest} or more, or --tokenizer byte.")  # fmt: skip


def _require_support(asked: int | None, found: int, of: str) -> None:
    """Errors: `UserError` where a size was asked for that the text does not have enough for."""
    if asked is not None and found < asked:
        raise UserError(f"The text supports {found:,} tokens ({of}), not --vocab-size {asked}.", f"Use --vocab-size {found} or less, or leave it out.")
