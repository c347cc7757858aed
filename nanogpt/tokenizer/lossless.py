"""Convert a `tokenizer.json` to an equivalent one that encodes every text exactly, or refuse it.

The result has one of two forms. In a byte-level tokenizer like GPT-2's, each byte of UTF-8 is a
character of `BYTE_TO_UNICODE`. In one with byte fallback like Llama's, tokens are text, and a
character without a token is encoded by the tokens `BYTES`. Tokens and ids stay; what changes text
is removed: a space before the first word, tokens around the text, and the search for special
tokens in it. Special tokens become ordinary entries that no merge produces.
"""

from typing import Any

from nanogpt.errors import UserError

Spec = dict[str, Any]  # a parsed tokenizer.json, or a part of one
Vocab = dict[str, int]
Merges = list[list[str]]

EOT = "<|end|>"  # ends a document
# Names of that token in other tokenizers, in order of preference.
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", EOT)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"  # SentencePiece's form of a space

# GPT-2's encoder.py, bytes_to_unicode: printable characters for all bytes.
_substitutes = iter(range(0x100, 0x200))
BYTE_TO_UNICODE = [
    chr(byte)
    if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
    else chr(next(_substitutes))
    for byte in range(256)
]

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
BYTE_FALLBACK = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
SPACE_REPLACEMENT = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SPACE_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithNext",
    "invert": False,
}
USE_ANOTHER = (
    "Use a byte-level BPE like GPT-2's, one with byte_fallback like Llama's, or train one with "
    "tokenizer = bpe."
)
# Pre-tokenizers that only split the text, unless their behavior is "Removed".
SPLITTING_TYPES = ("Split", "Digits", "Punctuation", "UnicodeScripts")


def make_lossless(spec: Spec) -> Spec:
    """Return the content of a lossless tokenizer.json with the same tokens.

    Args:
        spec: The content of a tokenizer.json, as the `tokenizers` library writes it. A lossless
            one comes back unchanged.

    Raises:
        UserError: The tokenizer cannot encode every text exactly.
    """
    model = spec["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"its model is {model['type']}, not BPE")
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise _unsupported("its BPE has a dropout, a subword prefix or an end-of-word suffix")
    is_byte_level = any(step["type"] == "ByteLevel" for step in _steps(spec["pre_tokenizer"]))
    convert = _convert_byte_level if is_byte_level else _convert_byte_fallback
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    vocab, merges, splits = convert(spec, model["vocab"] | added)
    eot = find_eot(vocab)
    if eot is None:
        eot = EOT
        vocab[EOT] = len(vocab)
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise _unsupported(f"the ids of its {len(vocab):,} tokens are not 0 to {len(vocab) - 1:,}")
    pre_tokenizer = splits[0] if splits else None
    if len(splits) > 1:
        pre_tokenizer = {"type": "Sequence", "pretokenizers": splits}
    # A decoder ignores add_prefix_space; the library writes it as true.
    byte_level_decoder = BYTE_LEVEL | {"add_prefix_space": True}
    return spec | {
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level_decoder if is_byte_level else BYTE_FALLBACK,
        "model": model
        | {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": not is_byte_level,
            "vocab": vocab,
            # No text may produce the token that ends a document.
            "merges": [pair for pair in merges if pair[0] + pair[1] != eot],
        },
    }


def find_eot(vocab: Vocab) -> str | None:
    """Return the name of the token that ends a document, if it has one of the usual names."""
    return next((name for name in EOT_NAMES if name in vocab), None)


def _convert_byte_level(spec: Spec, vocab: Vocab) -> tuple[Vocab, Merges, list[Spec]]:
    """Return the vocabulary, merges and pre-tokenizers of a byte-level tokenizer."""
    missing = [byte for byte, char in enumerate(BYTE_TO_UNICODE) if char not in vocab]
    if missing:
        raise _unsupported(
            f"{len(missing)} of the 256 bytes have no token, the first of them 0x{missing[0]:02X}"
        )
    if all(step["type"] != "ByteLevel" for step in _steps(spec["decoder"])):
        raise _unsupported("it has no ByteLevel decoder")
    if normalizers := _steps(spec["normalizer"]):
        raise _normalizer_error(normalizers[0])
    splits = [
        BYTE_LEVEL | {"use_regex": step["use_regex"]} if step["type"] == "ByteLevel" else step
        for step in _steps(spec["pre_tokenizer"])
    ]
    if sum(not _only_splits(step) for step in splits) > 1:
        raise _unsupported("its pre-tokenizers do more than split the text and map it to bytes")
    return vocab, spec["model"]["merges"], splits


def _convert_byte_fallback(spec: Spec, vocab: Vocab) -> tuple[Vocab, Merges, list[Spec]]:
    """Return the vocabulary, merges and pre-tokenizers of a tokenizer with byte fallback."""
    merges = spec["model"]["merges"]
    missing = [name for name in BYTES if name not in vocab]
    if missing or not spec["model"]["byte_fallback"]:
        lacks = "byte_fallback"
        if spec["model"]["byte_fallback"]:
            lacks = f"{len(missing)} of the tokens <0x00> to <0xFF>"
        raise _unsupported(f"it is not byte-level, and it lacks {lacks}")
    if all(step["type"] != "ByteFallback" for step in _steps(spec["decoder"])):
        raise _unsupported("it has no ByteFallback decoder")
    normalizers = _steps(spec["normalizer"])
    splits = _steps(spec["pre_tokenizer"])
    for step in normalizers:
        if step not in (SPACE_REPLACEMENT, {"type": "Prepend", "prepend": SPACE}):
            raise _normalizer_error(step)
    if SPACE_REPLACEMENT in normalizers or any(step["type"] == "Metaspace" for step in splits):
        vocab = _restore_spaces(spec, vocab)
        merges = [[part.replace(SPACE, " ") for part in pair] for pair in merges]
        splits = _split_at_spaces(splits)
    if any(not _only_splits(step) for step in splits):
        raise _unsupported("its pre-tokenizers do more than split the text")
    return vocab, merges, splits


def _restore_spaces(spec: Spec, vocab: Vocab) -> Vocab:
    """Replace `SPACE` by a space in all tokens, so that a `SPACE` in a text stays one."""
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    renamed = {
        name if name in special else name.replace(SPACE, " "): token
        for name, token in vocab.items()
    }
    if len(renamed) < len(vocab):
        raise _unsupported(f"some of its tokens differ only in {SPACE} and a space")
    return renamed


def _split_at_spaces(steps: list[Spec]) -> list[Spec]:
    """Return the pre-tokenizers that split at spaces where the given ones split at `SPACE`."""
    for step in steps:
        separator = step.get("replacement") or step.get("pattern", {}).get("String")
        if separator not in (SPACE, " "):
            raise _unsupported("its pre-tokenizers split at other characters than spaces")
    return [dict(SPACE_SPLIT) for step in steps if step.get("split")]


def _steps(step: Spec | None) -> list[Spec]:
    """Return a pipeline step as a list of simple steps."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        nested = next(value for name, value in step.items() if name != "type")
        return [simple for inner in nested for simple in _steps(inner)]
    return [step]


def _only_splits(step: Spec) -> bool:
    return step["type"] in SPLITTING_TYPES and step.get("behavior") != "Removed"


def _normalizer_error(step: Spec) -> UserError:
    return _unsupported(
        f"its normalizer {step['type']} rewrites the text",
        'Set "normalizer" to null in a copy of the file.',
    )


def _unsupported(reason: str, fix: str = USE_ANOTHER) -> UserError:
    return UserError(f"This tokenizer.json cannot encode every text exactly: {reason}.", fix)
