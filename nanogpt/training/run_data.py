"""Prepare the text of a new run, or find the text of an existing run again."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt import checkpoint
from nanogpt.config import Config
from nanogpt.data.prepare import PreparedData, open_prepared, prepare
from nanogpt.data.sources import is_prepared, resolve_sources
from nanogpt.errors import Notice, UserError
from nanogpt.run_folder import RunFolder
from nanogpt.tokenizer.tokenizer import Tokenizer

TEXT_IDENTITY = ("fingerprint", "val_fingerprint")
TOKEN_IDENTITY = ("train_tokens", "val_tokens")
DATA_IDENTITY = TEXT_IDENTITY + TOKEN_IDENTITY


def prepare_run_data(
    sources: Sequence[str], config: Config, init_checkpoint: checkpoint.LoadedModel | None
) -> PreparedData:
    """Tokenize the text of a new run, with the tokenizer of the initial checkpoint if any.

    Raises:
        UserError: If no text is named, or it cannot be prepared.
    """
    if not sources:
        raise UserError(
            "There is no text to train on.",
            "Name a file, a folder or a built-in text, for example: nanogpt train python-docs",
        )
    if init_checkpoint is None:
        return prepare(sources, config.data)
    prepared = prepare(sources, config.data, init_checkpoint.tokenizer)
    # A token is unseen only if it occurs in neither text: intersect the ranges.
    unseen = [
        [max(start, other_start), min(stop, other_stop)]
        for start, stop in prepared.metadata["unseen_token_ranges"]
        for other_start, other_stop in init_checkpoint.summary["unseen_token_ranges"]
        if max(start, other_start) < min(stop, other_stop)
    ]
    return replace(prepared, metadata=prepared.metadata | {"unseen_token_ranges": unseen})


def load_run_data(run: Path, config: Config, sources: Sequence[str] = ()) -> PreparedData:
    """Open the tokens of an existing run, or prepare them again from its sources.

    Args:
        run: The run folder.
        config: The configuration of the run.
        sources: Where the text is now; by default, where it was at the start of the run.

    Raises:
        UserError: If data.json is damaged, or the text or its tokens have changed.
    """
    try:
        saved = RunFolder(run).read_data()
    except (OSError, ValueError) as error:
        raise UserError(
            f"The description of the text is missing or damaged: {run / 'data.json'} ({error}).",
            {"overwrite": True},
        ) from error
    if not sources:
        # The cache may have been cleaned, or a named folder may hold another text by now.
        with suppress(UserError):
            prepared = open_prepared(Path(saved["cache_dir"]))
            if _differing(DATA_IDENTITY, saved, prepared) == []:
                return replace(prepared, metadata=saved)
    if not sources and "-" in saved["sources"]:
        raise UserError(
            f"The text of {run} was read from standard input, and its tokens are no longer in "
            f"{saved['cache_dir']}.",
            "Name the text again.",
        )
    tokenizer = checkpoint.load(run).tokenizer if "init_from" in saved else None
    prepared = prepare(sources or saved["sources"], config.data, tokenizer)
    if _differing(TEXT_IDENTITY, saved, prepared):
        raise UserError(
            f"The text differs from the training text of {run}: {_describe(prepared.metadata)} "
            f"(expected {_describe(saved)}).",
            "Name the same text, or train in another folder.",
        )
    if _differing(TOKEN_IDENTITY, saved, prepared):
        raise UserError(
            f"The tokenizer of {run} ({config.data.tokenizer}) has changed: it makes "
            f"{prepared.metadata['train_tokens']:,} training tokens (expected "
            f"{saved['train_tokens']:,}).",
            "Restore the tokenizer file, or train in another folder.",
        )
    found = {name: prepared.metadata[name] for name in ("sources", "cache_dir")}
    return replace(prepared, metadata=saved | found)


def find_run_data(run: Path, summary: dict[str, Any], tokenizer: Tokenizer) -> PreparedData | None:
    """Open or prepare the text that a model in the folder `run` was trained on.

    Returns:
        The data, or None if `run` is not the run folder of the model.
    """
    folder = RunFolder(run)
    if not folder.data_path.is_file():
        return None
    prepared = load_run_data(run, folder.read_config())
    is_same_text = prepared.metadata["fingerprint"] == summary["data_fingerprint"]
    is_same_tokenizer = prepared.tokenizer.to_json() == tokenizer.to_json()
    return prepared if is_same_text and is_same_tokenizer else None


def iter_run_documents(prepared: PreparedData) -> Iterator[tuple[str, str]]:
    """Yield name and text of each document of a run, as they are on disk now.

    It yields nothing for text from standard input and for folders of prepared tokens.
    """
    names = prepared.metadata["sources"]
    if "-" in names or any(is_prepared(name) for name in names):
        return
    data_config = prepared.metadata["data_config"]
    # Skipped files were reported when the run started.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        sources = resolve_sources(names, data_config["encoding"], data_config["text_field"])
    for source in sources:
        yield from ((source.name, "".join(chunks)) for chunks in source.iter_documents())


def open_same_data(
    metadata: dict[str, Any], config: Config, tokenizer_json: str | None, rank: int
) -> PreparedData:
    """Open or prepare, on another rank, the data that rank 0 described by `metadata`.

    Raises:
        UserError: If this rank finds another text.
    """
    try:
        prepared = open_prepared(Path(metadata["cache_dir"]))
    except UserError:
        tokenizer = Tokenizer.from_json(tokenizer_json) if tokenizer_json else None
        prepared = prepare(metadata["sources"], config.data, tokenizer)
    if differing := _differing(DATA_IDENTITY, metadata, prepared):
        differences = ", ".join(
            f"{name} {prepared.metadata[name]} (rank 0: {metadata[name]})" for name in differing
        )
        raise UserError(
            f"Rank {rank} has a different text: {differences}.",
            "Copy the same text to every machine.",
        )
    cache_dir = prepared.metadata["cache_dir"]
    prepared = replace(prepared, metadata=metadata | {"cache_dir": cache_dir})
    if config.data.cross_documents:
        return prepared
    return prepared.with_document_windows(config.model.context_length)


def fixed_settings(prepared: PreparedData) -> dict[str, Any]:
    """Return the settings that a folder of prepared tokens fixes; none for any other text."""
    metadata = prepared.metadata
    if metadata["sources"] != [metadata["cache_dir"]]:
        return {}
    settings = metadata["data_config"].items()
    return {name: value for name, value in settings if name != "cross_documents"}


def _differing(names: Sequence[str], saved: dict[str, Any], prepared: PreparedData) -> list[str]:
    return [name for name in names if prepared.metadata[name] != saved[name]]


def _describe(metadata: dict[str, Any]) -> str:
    num_bytes = metadata["train_bytes"] + metadata["val_bytes"]
    return f"{num_bytes:,} bytes, SHA-256 {metadata['fingerprint'][:16]}…"
