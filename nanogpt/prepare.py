"""Text to token files, read twice and never held whole: once for its alphabet and its fingerprint, once to write it down.

In: documents and the `[text]` settings. Out: `Prepared`: the tokenizer, two mapped token files and what is known of the text, in
a folder of the cache that is named by the content, so that the same text is never encoded twice.
Refuses: a text with too little to train on or to validate on.

Split: one text gives its last tenth, in one piece; many give whole documents, taken in the order of their names' hashes while
they fit into a tenth, or the last tenth of all, where no such choice comes near it; never more than `val_bytes`.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nanogpt.config import TextConfig
from nanogpt.corpus import CHUNK, Document, expand, findable
from nanogpt.data import open_tokens, token_dtype
from nanogpt.errors import Notice, UserError
from nanogpt.evaluate import ngram_losses
from nanogpt.files import cache_dir, discard, replacing, require_space, sweep
from nanogpt.tokenizer import Tokenizer, train_tokenizer

VERSION = 1  # of the prepared files: part of their name


@dataclass(frozen=True)
class Prepared:
    """A text as tokens.

    `about` is what text.json holds: "fingerprint" and "val_fingerprint" (of the text, and of that given with --val), "sources",
    "documents", "train_bytes", "val_bytes", "symbols" (different tokens in the training split), "train_tokens", "val_tokens",
    "split" (in words), "baselines" (nats per token, see `evaluate.ngram_losses`), "unused" (tokens the training split lacks,
    as [first, behind the last] pairs) and "folder" (where the tokens are).
    """

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    about: dict[str, Any]


def prepare(sources: Sequence[str], settings: TextConfig, tokenizer: Tokenizer | None = None) -> Prepared:
    """Make the tokens of a text, or reuse the cached ones; those of a given `tokenizer`, or of one that is made from the text. Says what a given one lacks.

    Errors: `UserError` when a source is not there or not text, when the text is too short, or when the disk is full.
    """
    documents, validation = expand(sources, settings.encoding), expand([settings.val] if settings.val else [], settings.encoding)
    scan = _Scan(documents)
    if tokenizer is None:
        tokenizer = train_tokenizer(settings.tokenizer, scan, settings.vocab_size)
    else:
        _note_unknown(scan, tokenizer)
    held_out = _Scan(validation)
    for _ in held_out:
        pass
    key = [VERSION, scan.fingerprint, settings.val and held_out.fingerprint, tokenizer.to_json(), settings.val_bytes]
    folder = cache_dir() / "tokens" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    try:
        prepared = open_prepared(folder)
    except UserError:  # not there, or no longer whole
        discard(folder)
        sweep(folder.parent, older_than=86_400)
        tokens = sum(scan.sizes) + sum(held_out.sizes)  # a token is a byte of the text or more of it
        require_space(folder, tokens * token_dtype(tokenizer.vocab_size).itemsize)
        with replacing(folder) as unfinished:
            unfinished.mkdir()
            _write(unfinished, scan, held_out, tokenizer, settings.val_bytes)
        prepared = open_prepared(folder)
    return replace(prepared, about=prepared.about | {"sources": [findable(source) for source in sources]})


def open_prepared(folder: Path) -> Prepared:
    """Open what `prepare` wrote. Errors: `UserError` when it is no longer there."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        train, val = (open_tokens(folder / f"{split}.bin", tokenizer.vocab_size) for split in ("train", "val"))
        if [len(train), len(val)] != [about["train_tokens"], about["val_tokens"]]:
            raise ValueError("a token file was cut short")
    except (OSError, ValueError) as error:
        raise UserError(f"The prepared text is no longer whole in {folder} ({error}).", "Name the text again, and it is prepared again.") from error
    return Prepared(tokenizer, train, val, about | {"folder": str(folder)})


class _Scan:
    """The first reading: yields the text in pieces, and knows its fingerprint and sizes when it is through."""

    def __init__(self, documents: list[Document]):
        self.documents = documents
        self.sizes: list[int] = []  # bytes of UTF-8, a document each

    def __iter__(self) -> Iterator[str]:
        digest = hashlib.sha256()
        for document in self.documents:
            size = 0
            for chunk in document.chunks():
                utf8 = chunk.encode()
                digest.update(utf8)
                size += len(utf8)
                yield chunk
            self.sizes.append(size)
            if len(self.documents) > 1:  # names decide the split; a lone text may be called anything
                digest.update(f"\0{document.name}\0{size}".encode())
        self.fingerprint = digest.hexdigest()


def _note_unknown(chunks: Iterable[str], tokenizer: Tokenizer) -> None:
    """Read a text, and warn of the characters that a tokenizer has no token for."""
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk)
    unknown = {letter: counts[letter] for _, letter in tokenizer.unknown("".join(sorted(counts)))}
    if unknown:
        most = ", ".join(f"{letter!r} {count:,} times" for letter, count in Counter(unknown).most_common(5))
        warnings.warn(
            f"The model has no token for {len(unknown)} of the {len(counts)} different characters of the text, which are {sum(unknown.values()):,} of its "
            f"{sum(counts.values()):,} characters ({most}{', …' if len(unknown) > 5 else ''}): they are spelled by their bytes.", Notice, stacklevel=3
        )  # fmt: skip


def _write(folder: Path, scan: _Scan, held_out: _Scan, tokenizer: Tokenizer, val_bytes: int) -> None:
    """The second reading: token files, tokenizer and about.json, into a folder that exists."""
    total = sum(scan.sizes)
    room = min(total - total * 9 // 10, val_bytes)
    chosen = _choose(scan, room) if len(scan.documents) > 1 and not held_out.documents else set()
    if held_out.documents:
        cut, split = total, "the text given with --val is held out"
    elif chosen:
        cut, split = total, f"{len(chosen)} of {len(scan.documents)} documents, chosen by a hash of their names, are held out"
    else:
        cut, split = total - room, "the last {val_bytes:,} of {total:,} bytes are held out"
    dtype, done = token_dtype(tokenizer.vocab_size), 0
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        for i, document in enumerate(scan.documents):
            files = [val] if i in chosen or cut <= done else [train] if done + scan.sizes[i] <= cut else [train, val]
            _encode(document, tokenizer, dtype, files, cut - done, ends=len(scan.documents) > 1)
            done += scan.sizes[i]
        for document in held_out.documents:
            _encode(document, tokenizer, dtype, [val], 0, ends=len(held_out.documents) > 1)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8", newline="")
    counts = [_count(folder / f"{name}.bin", tokenizer.vocab_size) for name in ("train", "val")]
    _require_enough(*counts)
    mapped = [open_tokens(folder / f"{name}.bin", tokenizer.vocab_size) for name in ("train", "val")]
    lengths = np.array([len(spelled) for spelled in tokenizer.token_bytes])
    lengths[tokenizer.end] = 0  # it stands for no text
    sizes = {"train_bytes": int(counts[0] @ lengths), "val_bytes": int(counts[1] @ lengths)}
    if sum(sizes.values()) != total + sum(held_out.sizes):
        raise UserError("The text changed while it was read.", "Try again, or train on a copy of it.")
    about = {
        "fingerprint": scan.fingerprint, "val_fingerprint": held_out.fingerprint, "documents": len(scan.documents),
        "split": split.format(total=total, **sizes), **sizes,
        "symbols": int(np.count_nonzero(counts[0])), "train_tokens": len(mapped[0]), "val_tokens": len(mapped[1]),
        "baselines": ngram_losses(*mapped), "unused": _ranges(counts[0] == 0),
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _choose(scan: _Scan, room: int) -> set[int]:
    """Whole documents for validation, in the order of their names' hashes, as many as fit into `room` bytes; none if that is not half of it."""
    by_hash = sorted(range(len(scan.documents)), key=lambda i: hashlib.sha256(scan.documents[i].name.encode()).digest())
    chosen, size = set(), 0
    for i in by_hash:
        if 0 < scan.sizes[i] <= room - size:
            chosen.add(i)
            size += scan.sizes[i]
    return chosen if size >= room / 2 else set()


def _encode(document: Document, tokenizer: Tokenizer, dtype: np.dtype, files: Sequence[BinaryIO], cut: int, ends: bool) -> None:
    """Write a document's tokens to the file; to two of them, what comes before and after `cut` bytes of it; then the token that ends a document."""
    for part, file in enumerate(files):
        for tokens in tokenizer.encode_chunks(_part(document, cut, part) if len(files) > 1 else document.chunks()):
            file.write(tokens.astype(dtype).tobytes())
    if ends:
        files[-1].write(np.array([tokenizer.end], dtype).tobytes())


def _part(document: Document, cut: int, part: int) -> Iterator[str]:
    """The text before (part 0) or after (part 1) so many bytes of a document."""
    for chunk in document.chunks():
        utf8 = chunk.encode()
        at = min(max(cut, 0), len(utf8))
        while at < len(utf8) and utf8[at] & 0xC0 == 0x80:  # within a character, which stays whole
            at += 1
        yield (utf8[at:] if part else utf8[:at]).decode()
        cut -= len(utf8)


def _count(path: Path, vocab_size: int) -> np.ndarray:
    """(V,) how often each token occurs in a file, which may be empty."""
    counts = np.zeros(vocab_size, np.int64)
    with path.open("rb") as file:
        while len(piece := np.fromfile(file, token_dtype(vocab_size), CHUNK)):
            counts += np.bincount(piece, minlength=vocab_size)
    return counts


def _ranges(mask: np.ndarray) -> list[tuple[int, int]]:
    """Where a (V,) mask is true, as [first, behind the last] pairs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _require_enough(train: np.ndarray, val: np.ndarray) -> None:
    """Refuse what cannot be learned from, by the number of each token in both splits."""
    if train.sum() < 2 or val.sum() < 2:
        raise UserError(
            f"The text is too short: {train.sum()} tokens to train on and {val.sum()} to validate on; at least 2 of each are needed.",
            "Use a longer text (or a larger --val-bytes): 20 characters is the minimum, a few thousand is useful.",
        )
    if np.count_nonzero(train) < 2:
        raise UserError(f"The {train.sum():,} tokens to train on are all the same symbol: there is nothing to learn.", "Use another text.")
