"""Turn text into token shards, reusing what is cached or partly prepared.

The text is read twice and never held in memory: `scan` measures it, then `shards` encodes it.
Between the two passes, a tokenizer may be trained. Each unit of work is written atomically, so
preparation can be interrupted, resumed, and shared by several processes. The process that finds all
units complete writes `index.json`.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.baselines import ngram_losses
from nanogpt.config import DataConfig, is_path
from nanogpt.data.prepared import (
    FORMAT_VERSION,
    PreparedData,
    mark_verified,
    open_prepared,
    open_splits,
)
from nanogpt.data.scan import CorpusScan, warn_unknown_chars
from nanogpt.data.shards import read_unit, tokenizer_id, true_ranges, write_unit
from nanogpt.data.sources import absolute_source, is_prepared, resolve_sources
from nanogpt.errors import UserError
from nanogpt.files import cache_dir, remove, remove_stale_temp_files, require_space, write_text
from nanogpt.sizes import token_dtype
from nanogpt.tokenizer.tokenizer import Tokenizer, train_tokenizer

# The names of the files in a folder of prepared tokens.
PREPARED_FILES = re.compile(
    r"(train|val)-\d{5}\.(bin|ends)|unit-\d{5}\.json|(tokenizer|index|verified)\.json"
)
# Written first, so that an empty folder already belongs to a text and its settings.
KEY_FILE = ".key"
# Encoding threads take 10 MB each; tokenizers with many merges run their own threads as well.
MAX_THREADS = 8
# A temporary file may be in use until this age, by a clock that may be another machine's.
STALE_TEMP_SECONDS = 86_400.0


def prepare(
    sources: Sequence[str], config: DataConfig, tokenizer: Tokenizer | None = None
) -> PreparedData:
    """Return the tokens of a text, from the cache if it has them.

    Args:
        sources: Names of texts, or the one folder that `prepare_folder` filled.
        config: The data settings.
        tokenizer: The tokenizer to use; by default the one that the settings describe.

    Raises:
        UserError: A source is missing or not text, the text is too short, or the disk is full.
    """
    config = _with_absolute_paths(config)
    if len(sources) == 1 and is_prepared(absolute_source(sources[0])):
        prepared = _open_source_folder(sources[0], config, tokenizer)
    else:
        prepared = _prepare_in_cache(PreparationJob(sources, config, tokenizer))
    absolute_sources = [absolute_source(source) for source in sources]
    return replace(prepared, metadata=prepared.metadata | {"sources": absolute_sources})


def prepare_folder(
    sources: Sequence[str], config: DataConfig, folder: Path, shard: tuple[int, int] = (1, 1)
) -> PreparedData | list[int]:
    """Write the tokens of a text to a folder.

    Args:
        sources: Names of texts.
        config: The data settings.
        folder: The folder, new or partly filled by the same preparation.
        shard: (index, count): do the index-th of count equal parts of the work, from 1.

    Returns:
        The prepared text, or the numbers of the units that other processes still have to write.

    Raises:
        UserError: As for `prepare`; or the shard is not in range, or the folder holds other files.
    """
    index, count = shard
    if not 1 <= index <= count:
        raise UserError(
            f"Shard {index}/{count} is out of range: the index goes from 1 to the count.",
            "Use 1/2 in one process and 2/2 in the other, for example.",
        )
    config = _with_absolute_paths(config)
    job = PreparationJob(sources, config)
    return job.run(folder, index, count) or open_prepared(folder)


def absolute_paths(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the data settings that name a path, with absolute paths."""
    val_text = settings.get("val_text")
    tokenizer = settings.get("tokenizer")
    paths = {}
    if val_text and isinstance(val_text, str | os.PathLike):
        paths["val_text"] = absolute_source(os.fspath(val_text))
    if isinstance(tokenizer, os.PathLike) or (isinstance(tokenizer, str) and is_path(tokenizer)):
        paths["tokenizer"] = os.path.abspath(os.path.expanduser(tokenizer))
    return paths


def _with_absolute_paths(config: DataConfig) -> DataConfig:
    return config.model_copy(update=absolute_paths(config.model_dump()))


def _open_source_folder(
    source: str, config: DataConfig, tokenizer: Tokenizer | None
) -> PreparedData:
    """Open a folder of prepared tokens, and check that it agrees with the settings."""
    prepared = open_prepared(Path(absolute_source(source)))
    ignored = {"cross_documents"}
    if tokenizer is not None:
        ignored |= {"tokenizer", "vocab_size"}
    used = prepared.metadata["data_config"]
    differences = [
        f"{name} = {getattr(config, name)!r}, but {used[name]!r} in the folder"
        for name in config.model_fields_set - ignored
        if getattr(config, name) != used[name]
    ]
    if differences:
        raise UserError(
            f"{source} was prepared with other settings: {'; '.join(differences)}.",
            "Leave these settings out, or name the text itself.",
        )
    if tokenizer is not None and tokenizer.to_json() != prepared.tokenizer.to_json():
        raise UserError(
            f"{source} was prepared with another tokenizer than the model's.",
            "Name the text itself.",
        )
    return prepared


def _prepare_in_cache(job: "PreparationJob") -> PreparedData:
    folder = cache_dir() / "tokens" / job.key
    try:
        return open_prepared(folder)
    except UserError:  # missing, incomplete or damaged
        if (folder / "index.json").exists():
            remove(folder)
        job.run(folder)
        return open_prepared(folder)


class PreparationJob:
    """The preparation of one text with one set of settings.

    The constructor reads the text once.

    Args:
        sources: Names of texts.
        config: The data settings, with absolute paths.
        tokenizer: The tokenizer to use; by default the one that the settings describe.
    """

    def __init__(
        self, sources: Sequence[str], config: DataConfig, tokenizer: Tokenizer | None = None
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.scan, self.val_scan = _scan_splits(sources, config)
        if tokenizer is not None:
            warn_unknown_chars(self.scan.iter_text(), tokenizer)
        if config.val_text:
            self.split = self.scan.assign_all_to("train")
        else:
            self.split = self.scan.split(config.max_val_bytes)
        scans = (self.scan, self.val_scan)
        self.units = [(scan, unit) for scan in scans for unit in range(len(scan.units))]
        self.key = self._key()

    def run(self, folder: Path, index: int = 1, count: int = 1) -> list[int]:
        """Encode every count-th missing unit, starting at the index-th, and complete the folder.

        Returns:
            The numbers of the units that are still missing.

        Raises:
            UserError: The folder has other content, the text is too short, or the disk is full.
        """
        is_new = not folder.exists()
        self._require_own_folder(folder)
        remove_stale_temp_files(folder, older_than=STALE_TEMP_SECONDS)
        tokenizer = self._get_tokenizer(folder)
        shard_units = range(index - 1, len(self.units), count)
        my_units = [number for number in shard_units if read_unit(folder, number) is None]
        work = [self.units[number] for number in my_units]
        text_bytes = sum(scan.unit_bytes(unit) for scan, unit in work)
        # A token stands for at least one byte of text.
        require_space(folder, text_bytes * token_dtype(tokenizer.vocab_size).itemsize)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / KEY_FILE, json.dumps({"key": self.key}))
        write_text(folder / "tokenizer.json", tokenizer.to_json())
        self._encode(folder, tokenizer, my_units)
        found = [read_unit(folder, number) for number in range(len(self.units))]
        units = [unit for unit in found if unit is not None]
        if len(units) < len(found):
            return [number for number, unit in enumerate(found) if unit is None]
        try:
            index_content = self._make_index(folder, tokenizer, units)
        except UserError:
            if is_new:
                remove(folder)
            raise
        write_text(folder / "index.json", json.dumps(index_content, indent=1))
        remove_stale_temp_files(folder, older_than=STALE_TEMP_SECONDS)
        return []

    def _key(self) -> str:
        """Return a hash of everything that the prepared files depend on."""
        if self.tokenizer is not None:
            tokenizer_key: list[Any] = [self.tokenizer.to_json()]
        else:
            tokenizer_key = [_tokenizer_key(self.config.tokenizer), self.config.vocab_size]
        parts = [
            FORMAT_VERSION,
            self.scan.fingerprint,
            self.config.val_text and self.val_scan.fingerprint,
            *tokenizer_key,
            # The same text has other units as a table than as an archive.
            [unit.text_offset for unit in self.scan.units],
            [unit.text_offset for unit in self.val_scan.units],
            self.config.max_val_bytes,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def _get_tokenizer(self, folder: Path) -> Tokenizer:
        """Return the given tokenizer, that of the existing units, or a newly trained one.

        Training is deterministic, so that every process gets the same one.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        if any(read_unit(folder, number) for number in range(len(self.units))):
            with suppress(OSError, UserError):
                return Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return train_tokenizer(
            self.config.tokenizer,
            self.scan.iter_text(),
            self.config.vocab_size,
            self.scan.total_bytes,
        )

    def _encode(self, folder: Path, tokenizer: Tokenizer, numbers: Sequence[int]) -> None:
        val_split = self.val_scan.assign_all_to("val")

        def encode_unit(number: int) -> list[str]:
            scan, unit = self.units[number]
            split = self.split if scan is self.scan else val_split
            return write_unit(folder, number, scan, unit, split, tokenizer, self.key)

        num_threads = max(1, min(MAX_THREADS, os.cpu_count() or 1, len(numbers)))
        with ThreadPoolExecutor(num_threads) as pool:
            futures = [pool.submit(encode_unit, number) for number in numbers]
            try:
                written = [name for future in futures for name in future.result()]
            finally:
                # After an error or Ctrl-C, the units that have not started are cancelled.
                pool.shutdown(wait=True, cancel_futures=True)
        mark_verified(folder, written)

    def _require_own_folder(self, folder: Path) -> None:
        """Raise `UserError` if a folder holds anything but a part of this job's files."""
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder.absolute()} is a file.", "Choose another output folder.")
        key_files = [folder / KEY_FILE, folder / "index.json", *folder.glob("unit-*.json")]
        keys = {key for path in key_files if (key := _read_key(path)) is not None}
        if keys - {self.key}:
            raise UserError(
                f"{folder.absolute()} holds the tokens of another text, or of this text with "
                "other settings or before it changed.",
                "Remove the folder, or choose another output folder.",
            )
        visible = sorted(path.name for path in folder.glob("[!.]*"))
        foreign = [name for name in visible if not (keys and PREPARED_FILES.fullmatch(name))]
        if foreign:
            raise UserError(
                f"{folder.absolute()} is not a folder of prepared text: "
                f"it holds {', '.join(foreign[:3])}.",
                "Choose another output folder.",
            )

    def _make_index(
        self, folder: Path, tokenizer: Tokenizer, units: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the content of `index.json`; raise `UserError` if the units cannot be used."""
        if any(unit["tokenizer"] != tokenizer_id(tokenizer) for unit in units):
            raise UserError(
                f"The units in {folder.absolute()} were encoded with different tokenizers.",
                "Remove the folder, and prepare all units with the same version of nanogpt.",
            )
        text_bytes = sum(unit["text_bytes"] for unit in units)
        total_bytes = self.scan.total_bytes + self.val_scan.total_bytes
        if text_bytes != total_bytes:
            raise UserError(
                f"The units in {folder.absolute()} hold {text_bytes:,} bytes of text, "
                f"not {total_bytes:,}.",
                "Remove the folder, and prepare all units again.",
            )
        is_used = np.zeros(tokenizer.vocab_size, bool)
        for unit in units:
            for start, stop in unit["used_token_ranges"]:
                is_used[start:stop] = True
        num_distinct_tokens = int(np.count_nonzero(is_used))
        files = [file for unit in units for file in unit["files"]]
        train, val = open_splits(folder, files, tokenizer.vocab_size)
        _require_enough_tokens(len(train), len(val), num_distinct_tokens)
        val_bytes = sum(unit["val_bytes"] for unit in units)
        description = self.split.description.format(
            total=self.scan.total_bytes, val_bytes=val_bytes
        )
        metadata = {
            "fingerprint": self.scan.fingerprint,
            "val_fingerprint": self.val_scan.fingerprint,
            "num_documents": len(self.scan.document_sizes),
            "split_description": description,
            "train_bytes": total_bytes - val_bytes,
            "val_bytes": val_bytes,
            "val_words": sum(unit["val_words"] for unit in units),
            "num_distinct_tokens": num_distinct_tokens,
            "train_tokens": len(train),
            "val_tokens": len(val),
            "baselines": ngram_losses(train, val),
            "unseen_token_ranges": true_ranges(~is_used),
            "data_config": self.config.model_dump(),
        }
        return {
            "version": FORMAT_VERSION,
            "key": self.key,
            "tokenizer": tokenizer_id(tokenizer),
            "metadata": metadata,
            "files": files,
        }


def _scan_splits(sources: Sequence[str], config: DataConfig) -> tuple[CorpusScan, CorpusScan]:
    """Read the text and the validation text; what is in both is only validated on."""
    val_names = [config.val_text] if config.val_text else []
    for name in [*sources, *val_names]:
        if is_prepared(absolute_source(name)):
            raise UserError(
                f"{name} is a folder of prepared text, which cannot be joined with other texts "
                "or held out.",
                "Name the texts it was made of, or train on it alone: nanogpt train FOLDER",
            )
    all_sources = resolve_sources(sources, config.encoding, config.text_field)
    val_sources = resolve_sources(val_names, config.encoding, config.text_field)
    val_keys = {source.key for source in val_sources}
    train_sources = [source for source in all_sources if source.key not in val_keys]
    if all_sources and not train_sources:
        raise UserError(
            "All of the text is held out by val_text: nothing is left to train on.",
            "Set val_text to another text, or leave it out.",
        )
    return CorpusScan.read(train_sources), CorpusScan.read(val_sources)


def _read_key(path: Path) -> str | None:
    """Return the key in a file of a prepared folder, or None if there is none."""
    with suppress(OSError, ValueError, AttributeError):  # the last if it is no JSON object
        return json.loads(path.read_text(encoding="utf-8")).get("key")
    return None


def _tokenizer_key(name: str) -> str:
    """Return the kind of a tokenizer, or the hash of its file."""
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name


def _require_enough_tokens(num_train: int, num_val: int, num_distinct: int) -> None:
    if num_train < 2 or num_val < 2:
        raise UserError(
            f"The text is too short: {num_train} tokens to train on and {num_val} to validate on "
            "(minimum 2 each).",
            "Use a longer text: 20 characters are the minimum, a few thousand are useful. "
            "A larger max_val_bytes holds out more.",
        )
    if num_distinct < 2:
        raise UserError(
            f"The {num_train:,} tokens to train on are all the same: there is nothing to learn.",
            "Use another text.",
        )
