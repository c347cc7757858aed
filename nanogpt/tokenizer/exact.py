"""Any tokenizer.json made exact, or refused.

In: the content of a tokenizer.json, as the `tokenizers` library writes it. Out: one of the same tokens, with the same ids, in one of two forms in which
every text has tokens that give it back:

byte-level, like GPT-2's: each byte of the UTF-8 is a letter of `LETTERS`, and tokens are strings of them;
with byte fallback, like Llama's: tokens are text, and a character without a token is spelled by those of its bytes, `BYTES`.

What other files put around that is taken off, because it changes text: a space before the first word, marks at the beginning and the end, tokens that are
found by their names in what a person wrote (they become ordinary entries, which no merge leads to).
Refuses: models that cannot spell every byte, and whatever rewrites or drops text on its way.
"""

from typing import Any

from nanogpt.errors import UserError

END = "<|end|>"  # of a document
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", END)  # what it is called in files of others, and here
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"  # how SentencePiece writes a space

_others = iter(range(0x100, 0x200))
LETTERS = [chr(byte) if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE else chr(next(_others)) for byte in range(256)]  # GPT-2's encoder.py

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTE_FALLBACK = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
LOSSLESS = ("Split", "Digits", "Punctuation", "UnicodeScripts")  # pre-tokenizers that only cut, unless their behavior is "Removed"


def exact(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer in a form that loses nothing; of one that has it already, the same content. Errors: `UserError` with what is missing."""
    model = spec["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}, and only BPE with all bytes can spell every text")
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise _refused("its BPE has a dropout, a prefix within words or a suffix of words, which are not in the text")
    if any(part["type"] == "ByteLevel" for part in _parts(spec["pre_tokenizer"])):
        vocab, merges, cuts, decoder = _byte_level(spec)
    else:
        vocab, merges, cuts, decoder = _byte_fallback(spec)
    end = end_of(vocab)
    if end is None:
        end, vocab[END] = END, len(vocab)
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise _refused(f"its {len(vocab):,} tokens do not have the numbers 0 to {len(vocab) - 1:,}")
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}
    plain["byte_fallback"] = decoder is BYTE_FALLBACK
    merges = [pair for pair in merges if pair[0] + pair[1] != end]  # no text may reach it
    return spec | {
        "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts} if len(cuts) > 1 else cuts[0] if cuts else None,
        "decoder": decoder, "model": model | plain | {"vocab": vocab, "merges": merges},
    }  # fmt: skip


def end_of(vocab: dict[str, int]) -> str | None:
    """The name of the token that ends a document, if there is one of the usual names."""
    return next((name for name in ENDS if name in vocab), None)


def _byte_level(spec: dict[str, Any]) -> tuple[dict[str, int], list[list[str]], list[dict[str, Any]], dict[str, Any]]:
    """Vocabulary, merges, pre-tokenizers and decoder of a byte-level tokenizer."""
    vocab = _vocabulary(spec)
    if missing := [byte for byte, letter in enumerate(LETTERS) if letter not in vocab]:
        raise _refused(f"{len(missing)} of the 256 bytes have no token in it, the first of them 0x{missing[0]:02X}")
    if all(part["type"] != "ByteLevel" for part in _parts(spec["decoder"])):
        raise _refused("it has no ByteLevel decoder")
    if rewriting := _parts(spec["normalizer"]):
        raise _rewriting(rewriting[0])
    cuts = [BYTE_LEVEL | {"use_regex": part["use_regex"]} if part["type"] == "ByteLevel" else part for part in _parts(spec["pre_tokenizer"])]
    if sum(not _only_cuts(part) for part in cuts) > 1:
        raise _refused("its pre-tokenizers do more than cut the text and turn it into bytes")
    return vocab, spec["model"]["merges"], cuts, BYTE_LEVEL | {"add_prefix_space": True}  # which a decoder has no use for: as the library writes it


def _byte_fallback(spec: dict[str, Any]) -> tuple[dict[str, int], list[list[str]], list[dict[str, Any]], dict[str, Any]]:
    """The same of a tokenizer with byte fallback; what SentencePiece wrote with `SPACE` gets real spaces, so that `SPACE` itself stays what it is."""
    vocab, merges = _vocabulary(spec), spec["model"]["merges"]
    if not spec["model"]["byte_fallback"] or (missing := [name for name in BYTES if name not in vocab]):
        lacks = f"{len(missing)} of the tokens <0x00> to <0xFF>" if spec["model"]["byte_fallback"] else "byte_fallback"
        raise _refused(f"it cannot spell every byte: it is not byte-level, and it lacks {lacks}")
    if all(part["type"] != "ByteFallback" for part in _parts(spec["decoder"])):
        raise _refused("it has no ByteFallback decoder")
    rewriting, cuts = _parts(spec["normalizer"]), _parts(spec["pre_tokenizer"])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    for part in rewriting:
        if part not in (spaces, {"type": "Prepend", "prepend": SPACE}):
            raise _rewriting(part)
    spaced = spaces in rewriting or any(part["type"] == "Metaspace" for part in cuts)
    if spaced:
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        renamed = {name if name in special else name.replace(SPACE, " "): token for name, token in vocab.items()}
        if len(renamed) < len(vocab):
            raise _refused(f"some of its tokens differ only in {SPACE} and a space")
        vocab, merges = renamed, [[part.replace(SPACE, " ") for part in pair] for pair in merges]
        if any((part.get("replacement") or part.get("pattern", {}).get("String")) not in (SPACE, " ") for part in cuts):
            raise _refused("its pre-tokenizers cut at something else than spaces")
        cuts = [{"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithNext", "invert": False} for part in cuts if part.get("split")]
    if any(not _only_cuts(part) for part in cuts):
        raise _refused("its pre-tokenizers do more than cut the text")
    return vocab, merges, cuts, BYTE_FALLBACK


def _vocabulary(spec: dict[str, Any]) -> dict[str, int]:
    """All tokens; those that were added to the model's come as ordinary ones."""
    return spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A step of the pipeline as a list: of nothing, of itself, or of what a sequence consists of."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        inner = next(value for name, value in step.items() if name != "type")
        return [part for one in inner for part in _parts(one)]
    return [step]


def _only_cuts(part: dict[str, Any]) -> bool:
    return part["type"] in LOSSLESS and part.get("behavior") != "Removed"


def _rewriting(part: dict[str, Any]) -> UserError:
    return _refused(f"it rewrites the text before it reads it (normalizer {part['type']})", 'Set "normalizer" to null in a copy of the file.')


def _refused(why: str, fix: str = "Use a byte-level BPE like GPT-2's, or one with byte_fallback like Llama's; or --tokenizer bpe makes one.") -> UserError:
    return UserError(f"This tokenizer.json cannot give every text back exactly: {why}.", fix)
