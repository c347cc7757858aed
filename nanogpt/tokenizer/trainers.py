"""Train a tokenizer of one of four kinds on a text.

char: each character of the text is a token; other characters are encoded as bytes.
byte: each of the 256 bytes is a token.
word: words, and the single characters between them, are tokens; a word without a token is encoded
    by its characters.
bpe: byte-level byte pair encoding (Sennrich et al. 2016; Radford et al. 2019, section 2.2).

Each vocabulary ends with the token that ends a document. No text produces that token, because it is
longer than a character, and no merge or word equals it.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanogpt.errors import Notice, UserError
from nanogpt.tokenizer.lossless import BYTE_TO_UNICODE, BYTES, EOT

NUM_CODE_POINTS = 0x110000
# A larger text is sampled: this much suffices to choose a vocabulary.
SAMPLE_BYTES = 100_000_000
SAMPLE_BLOCK_CHARS = 1 << 16
MIN_DEFAULT_VOCAB_SIZE = 512
MAX_DEFAULT_VOCAB_SIZE = 32_768
NUM_RESERVED = len(BYTES) + 1  # the bytes and the token that ends a document
WORDS = Regex(r"\w+|\s|[^\w\s]")

Trainer = Callable[[Iterable[str], int | None, int | None], Tokenizer]


def train_char(texts: Iterable[str], vocab_size: int | None, n_bytes: int | None) -> Tokenizer:
    """Return a tokenizer with every character of the text, in code point order, then the bytes."""
    is_used = np.zeros(NUM_CODE_POINTS, bool)
    for text in texts:
        is_used[_code_points(text)] = True
    return _byte_fallback_tokenizer([chr(point) for point in np.flatnonzero(is_used)])


def train_byte(texts: Iterable[str], vocab_size: int | None, n_bytes: int | None) -> Tokenizer:
    """Return a tokenizer with the 256 bytes, which does not depend on the text."""
    vocab = {name: token for token, name in enumerate([*BYTE_TO_UNICODE, EOT])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def train_word(texts: Iterable[str], vocab_size: int | None, n_bytes: int | None) -> Tokenizer:
    """Return a tokenizer with the characters and words of the text, then the bytes.

    If the vocabulary is too small for all of them, frequent characters come first, then frequent
    words.
    """
    blocks, total_bytes = sample_blocks("word", texts, n_bytes)
    # Four times the vocabulary of bpe, because words are not composed of smaller tokens.
    max_units = (vocab_size or default_vocab_size(16 * total_bytes)) - NUM_RESERVED
    _require_reserved(max_units)
    counts = np.zeros(NUM_CODE_POINTS, np.int64)
    for block in blocks:
        block_counts = np.bincount(_code_points(block.decode()))
        counts[: len(block_counts)] += block_counts
    by_frequency = np.argsort(-counts, kind="stable")[: min(max_units, np.count_nonzero(counts))]
    chars = [chr(point) for point in np.sort(by_frequency)]
    counter = Tokenizer(models.WordLevel())
    counter.pre_tokenizer = pre_tokenizers.Split(WORDS, "isolated")
    # The trainer counts single characters as words, too.
    word_trainer = trainers.WordLevelTrainer(
        vocab_size=max_units + len(chars), min_frequency=2, show_progress=False
    )
    counter.train_from_iterator(map(bytes.decode, blocks), word_trainer)
    ranked = sorted(counter.get_vocab().items(), key=lambda item: item[1])
    words = [name for name, _ in ranked if len(name) > 1]
    units = chars + words[: max_units - len(chars)]
    what = "words that occur at least twice, characters and bytes"
    _require_supported(vocab_size, len(units) + NUM_RESERVED, what)
    backend = _byte_fallback_tokenizer(units, ignore_merges=True)
    backend.pre_tokenizer = pre_tokenizers.Split(WORDS, "isolated")
    return backend


def train_bpe(texts: Iterable[str], vocab_size: int | None, n_bytes: int | None) -> Tokenizer:
    """Return a tokenizer with the 256 bytes, then merges of pairs that occur at least twice."""
    blocks, total_bytes = sample_blocks("bpe", texts, n_bytes)
    max_tokens = vocab_size or default_vocab_size(total_bytes)
    _require_reserved(max_tokens - NUM_RESERVED)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bpe_trainer = trainers.BpeTrainer(
        vocab_size=max_tokens - 1,
        min_frequency=2,
        initial_alphabet=BYTE_TO_UNICODE,
        show_progress=False,
    )
    backend.train_from_iterator(map(bytes.decode, blocks), bpe_trainer)
    num_tokens = backend.get_vocab_size() + 1
    _require_supported(vocab_size, num_tokens, "pairs that occur at least twice, and bytes")
    spec = json.loads(backend.to_str())
    spec["model"]["vocab"][EOT] = num_tokens - 1
    return Tokenizer.from_str(json.dumps(spec))


TRAINERS: dict[str, Trainer] = {
    "char": train_char,
    "byte": train_byte,
    "word": train_word,
    "bpe": train_bpe,
}
SIZED_KINDS = ("word", "bpe")  # the kinds that accept a vocabulary size


def default_vocab_size(n_bytes: int) -> int:
    """Return the vocabulary size for a text: the square root of its bytes, as a power of two.

    The number of distinct words grows about with the square root of a text (Heaps' law; Manning et
    al. 2008, section 5.1.1). So does the number of words that occur often enough to be learned as a
    token. 1 MB gets 1,024 tokens, 100 MB 8,192; the range is 512 to 32,768.
    """
    size = 2 ** round(math.log2(max(1, n_bytes)) / 2)
    return min(MAX_DEFAULT_VOCAB_SIZE, max(MIN_DEFAULT_VOCAB_SIZE, size))


def sample_blocks(kind: str, texts: Iterable[str], n_bytes: int | None) -> tuple[list[bytes], int]:
    """Return a text as blocks of UTF-8, evenly sampled if it is large, and its size in bytes.

    Every `stride`-th block is kept. When the blocks exceed `SAMPLE_BYTES`, every second one is
    dropped and the stride doubles.

    Args:
        kind: The kind of tokenizer, for the notice that the text was sampled.
        texts: The text, divided anywhere.
        n_bytes: The size of the text, if known; the sample is then as large as it may be.
    """
    blocks: list[bytes] = []
    size = 0
    total = 0
    stride = max(1, math.ceil((n_bytes or 0) / SAMPLE_BYTES))
    for number, block in enumerate(_iter_blocks(texts)):
        utf8 = block.encode()
        total += len(utf8)
        if number % stride == 0:
            blocks.append(utf8)
            size += len(utf8)
        # A known size may round up to one block more; a character has up to four bytes.
        if size > SAMPLE_BYTES + 4 * SAMPLE_BLOCK_CHARS:
            blocks = blocks[::2]
            stride *= 2
            size = sum(map(len, blocks))
    if size < total:
        warnings.warn(
            f"The vocabulary of {kind} tokens is chosen from a sample of {size / 1e6:,.1f} of "
            f"{total / 1e6:,.1f} MB, spread evenly over the text.",
            Notice,
            stacklevel=2,
        )
    return blocks, total


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _byte_fallback_tokenizer(units: list[str], ignore_merges: bool = False) -> Tokenizer:
    """Return a tokenizer for these units, all bytes, and the token that ends a document."""
    model = models.BPE(
        vocab={name: token for token, name in enumerate([*units, *BYTES, EOT])},
        merges=[],
        byte_fallback=True,
        ignore_merges=ignore_merges,
    )
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _iter_blocks(texts: Iterable[str]) -> Iterator[str]:
    """Iterate over a text in blocks of `SAMPLE_BLOCK_CHARS` characters."""
    buffer = ""
    for text in texts:
        buffer += text
        stop = len(buffer) // SAMPLE_BLOCK_CHARS * SAMPLE_BLOCK_CHARS
        for start in range(0, stop, SAMPLE_BLOCK_CHARS):
            yield buffer[start : start + SAMPLE_BLOCK_CHARS]
        buffer = buffer[stop:]
    if buffer:
        yield buffer


def _require_reserved(max_units: int) -> None:
    """Raise `UserError` unless a vocabulary has room for more than the reserved tokens."""
    if max_units < 1:
        raise UserError(
            f"A vocabulary of {NUM_RESERVED + max_units:,} tokens is too small: "
            f"the 256 bytes and the end of a document take {NUM_RESERVED}.",
            {"vocab_size": NUM_RESERVED + 1},
        )


def _require_supported(vocab_size: int | None, num_tokens: int, what: str) -> None:
    """Raise `UserError` if the text has fewer tokens than the requested vocabulary size."""
    if vocab_size is not None and num_tokens < vocab_size:
        raise UserError(
            f"The text supports {num_tokens:,} tokens ({what}), not vocab_size = {vocab_size}.",
            {"vocab_size": num_tokens},
        )
