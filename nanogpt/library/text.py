"""The text of a run: prepared for a new one, or found again for one that was begun.

In: names of texts, settings, a run folder. Out: a `Prepared`. Refuses: another text, or other tokens of the same text, than a run began with.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from nanogpt import checkpoint
from nanogpt.config import Config
from nanogpt.errors import UserError
from nanogpt.prepare import Prepared, open_prepared, prepare

SAME_TEXT = ("fingerprint", "val_fingerprint", "train_tokens", "val_tokens")  # by which a text is known again: what it says, and how it was cut


def new_text(sources: Sequence[str], settled: Config, earlier: checkpoint.Parts | None) -> Prepared:
    if not sources:
        raise UserError("There is no text to train on.", "Name a file, a folder or a built-in text, for example: nanogpt train python-docs")
    if earlier is None:
        return prepare(sources, settled.text)
    prepared = prepare(sources, settled.text, earlier.tokenizer)
    pairs = [(a, b) for a in prepared.about["unused"] for b in earlier.summary["unused"]]  # of ranges of tokens
    unused = [[max(a[0], b[0]), min(a[1], b[1])] for a, b in pairs if max(a[0], b[0]) < min(a[1], b[1])]  # in the texts of both
    return replace(prepared, about=prepared.about | {"unused": unused})


def text_of(run: Path, settled: Config, sources: Sequence[str] = ()) -> Prepared:
    """The text that a run was begun with: as it was prepared, or prepared again from where it lay or lies now."""
    try:
        about = json.loads((run / "text.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"What the run in {run} knew of its text is missing or damaged: {error}."
        raise UserError(what, "Train anew: --overwrite, or --out ANOTHER_FOLDER.") from error
    if not sources:
        with suppress(UserError):  # the cache may have been cleaned
            prepared = open_prepared(Path(about["folder"]))
            if all(prepared.about[name] == about[name] for name in SAME_TEXT):  # or a folder that a person named holds another text by now
                return replace(prepared, about=about)
    if not sources and "-" in about["sources"]:
        raise UserError(f"The text of {run} came from standard input, and its tokens are no longer in {about['folder']}.", "Give it the text again.")
    prepared = prepare(sources or about["sources"], settled.text, checkpoint.load(run).tokenizer if "init_from" in about else None)
    if any(prepared.about[name] != about[name] for name in SAME_TEXT[:2]):
        sizes = [f"{text['train_bytes'] + text['val_bytes']:,} bytes, SHA-256 {text['fingerprint'][:16]}…" for text in (about, prepared.about)]
        raise UserError(
            f"The text is not the one the run in {run} began with: then {sizes[0]}; now {sizes[1]}.", "Give it the same text, or train anew with --out FOLDER."
        )
    if any(prepared.about[name] != about[name] for name in SAME_TEXT[2:]):
        raise UserError(
            f"The tokenizer of {run} ({settled.text.tokenizer}) makes other tokens than when the run began: then {about['train_tokens']:,} of the same "
            f"text, now {prepared.about['train_tokens']:,}.",
            "Put the file back that it was, or train anew with --out FOLDER.",
        )
    return replace(prepared, about=about | {name: prepared.about[name] for name in ("sources", "folder")})
