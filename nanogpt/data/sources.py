"""Resolve names to text sources: files, folders, globs, standard input and built-in texts."""

import difflib
import glob
import hashlib
import http.client
import io
import os
import sys
import sysconfig
import urllib.request
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO, cast

from nanogpt.data import formats
from nanogpt.data.encoding import SNIFF_BYTES, identify_binary
from nanogpt.data.formats import DEFAULT_TEXT_FIELD, Source
from nanogpt.errors import Notice, UserError
from nanogpt.files import atomic_write, cache_dir

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def resolve_sources(
    names: Iterable[str], encoding: str | None = None, text_field: str | None = None
) -> list[Source]:
    """Return the sources of some names, each once and in a fixed order.

    Args:
        names: Each a file, a folder (every text file in it), a glob, `-` for standard input, or a
            built-in text: `python`, `python-docs` or `shakespeare`.
        encoding: The encoding of the text files; by default detected.
        text_field: The field or column that holds the text of a table; by default "text".

    Raises:
        UserError: A name matches nothing; the message has similar names.
    """
    sources: dict[Path | str, Source] = {}
    for name in names:
        for source in _resolve(name, encoding, text_field):
            source = replace(source, encoding=encoding, text_field=text_field or DEFAULT_TEXT_FIELD)
            sources.setdefault(source.key, source)
    return list(sources.values())


def absolute_source(name: str) -> str:
    """Return a source's name in a form that does not depend on the working directory."""
    if name == "-" or (name in BUILT_IN and not os.path.exists(name)):
        return name
    return os.path.abspath(os.path.expanduser(name))


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds prepared tokens, or a part of them.

    An `index.json` alone may belong to another program.
    """
    if not os.path.isdir(folder):
        return False
    required = ("index.json", "tokenizer.json")
    is_complete = all(os.path.isfile(os.path.join(folder, name)) for name in required)
    return is_complete or any(Path(folder).glob("unit-[0-9][0-9][0-9][0-9][0-9].json"))


def _resolve(name: str, encoding: str | None, text_field: str | None) -> list[Source]:
    """Resolve one name; an existing path takes precedence over a built-in text."""
    path = os.path.expanduser(name)
    if name == "-" and sys.stdin is None:
        raise UserError("Standard input is closed.", "Redirect it: nanogpt train - < book.txt")
    if name == "-":
        return [_spool("standard input", sys.stdin.buffer)]
    if os.path.isdir(path):
        return _list_folder(Path(path), encoding, text_field)
    if os.path.isfile(path):
        return [_file_source(os.path.basename(path), Path(path))]
    if os.path.exists(path):
        with open(path, "rb") as pipe:
            return [_spool(name, pipe)]
    if glob.has_magic(name):
        matches = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if matches:
            return [_file_source(os.path.basename(file), Path(file)) for file in matches]
    elif name in BUILT_IN:
        return BUILT_IN[name]()
    raise _not_found_error(name, Path(path or "."))


def _file_source(name: str, path: Path) -> Source:
    return Source(name, lambda: formats.open_decompressed(path), path=path.absolute())


def _list_folder(folder: Path, encoding: str | None, text_field: str | None) -> list[Source]:
    """Return every text file below a folder, sorted within each subfolder by name.

    Hidden files are skipped silently. A notice lists the other files and folders that are skipped:
    what is not text, runs and prepared text, and, if `text_field` is not set, tables without the
    default field.
    """
    texts: list[Source] = []
    not_text: list[str] = []
    without_field: list[str] = []
    own_folders: list[str] = []
    for parent, subfolders, file_names in os.walk(folder):
        visible = sorted(name for name in subfolders if not name.startswith("."))
        own = [name for name in visible if _is_written_by_nanogpt(os.path.join(parent, name))]
        own_folders += [Path(parent, name).relative_to(folder).as_posix() for name in own]
        subfolders[:] = [name for name in visible if name not in own]
        for name in sorted(name for name in file_names if not name.startswith(".")):
            path = Path(parent, name)
            source = _file_source(path.relative_to(folder).as_posix(), path)
            source = replace(source, encoding=encoding)
            if not _is_text(source):
                not_text.append(source.name)
            elif text_field is None and _lacks_text_field(source):
                without_field.append(source.name)
            else:
                texts.append(source)
    total = len(texts) + len(not_text) + len(without_field)
    _warn_skipped(not_text, f"{len(not_text)} of {total} files in {folder} are not text")
    _warn_skipped(
        without_field,
        f"{len(without_field)} of {total} files in {folder} are tables without a field "
        f"{DEFAULT_TEXT_FIELD!r} (text_field sets another)",
    )
    _warn_skipped(
        own_folders, f"{len(own_folders)} of the folders in {folder} are runs or prepared text"
    )
    if not texts:
        raise UserError(
            f"There is no text file in the folder {folder.absolute()} or below it.",
            "Name a folder that has text files.",
        )
    return texts


def _warn_skipped(names: list[str], reason: str) -> None:
    if names:
        examples = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        warnings.warn(f"{reason} and are skipped: {examples}", Notice, stacklevel=2)


def _is_written_by_nanogpt(folder: str) -> bool:
    """Return whether a folder is a run or prepared text."""
    run_files = ("config.toml", "metrics.jsonl")
    is_run = all(os.path.isfile(os.path.join(folder, name)) for name in run_files)
    return is_run or is_prepared(folder)


def _lacks_text_field(source: Source) -> bool:
    """Return whether a table's first record lacks the text field.

    Any other error is left for the read that needs the text.
    """
    if not source.is_table:
        return False
    try:
        next(source.iter_chunks(), None)
    except UserError as error:
        return isinstance(error, formats.MissingFieldError)
    return False


def _is_text(source: Source) -> bool:
    """Return whether a file in a folder is text or a table.

    A corrupt file counts as text, so that reading it reports the error.
    """
    assert source.path is not None, "a file in a folder"
    if not source.path.is_file():  # a broken link or a pipe
        return False
    if source.format == "parquet":
        return True
    try:
        with source.open() as stream:
            return identify_binary(stream.read(SNIFF_BYTES), source.encoding) is None
    except UserError:
        raise
    except Exception as error:
        return formats.corruption_message(error) is not None


def _not_found_error(name: str, path: Path) -> UserError:
    if "://" in name:
        return UserError(
            f"{name} is a URL, and nanogpt reads files.",
            "Download it, then give the path of the file.",
        )
    parent = next(folder for folder in path.absolute().parents if os.path.isdir(folder))
    candidates = [*os.listdir(parent), *BUILT_IN]
    similar = difflib.get_close_matches(path.name, candidates, n=3, cutoff=0.5)
    missing = (
        "No file matches the pattern" if glob.has_magic(name) else "There is no file or folder"
    )
    shown = str(path.absolute())
    if len(name) >= 300:
        shown = f"{name[:100]!r}… (this looks like a text itself: give the path of a file)"
    hint = f"Similar names: {', '.join(similar)}." if similar else f"No similar name in {parent}."
    return UserError(f"{missing} {shown}.", f"{hint} Built-in texts: {', '.join(BUILT_IN)}.")


def _spool(name: str, stream: BinaryIO) -> Source:
    """Copy a stream that can be read only once to a temporary file of this process."""
    spool = formats.spool(stream)
    if not os.fstat(spool.fileno()).st_size:
        return Source(name, io.BytesIO)
    # Each mapping has a position of its own; duplicated file descriptors would share one. The price
    # is that a disk that cannot be read back ends the process (SIGBUS). A full disk is an OSError
    # while the file is written, and no other process can shorten a file without a name.
    return Source(name, lambda: cast(BinaryIO, mmap(spool.fileno(), 0, access=ACCESS_READ)))


def _python_docs() -> list[Source]:
    """Return the language reference of CPython's `help()`, one text per topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python was installed without pydoc_data, which holds `python-docs`.",
            "Use `python`, the standard library's source code, or a file of your own.",
        ) from None
    return [
        Source(f"python-docs/{name}", partial(io.BytesIO, text.encode()))
        for name, text in sorted(topics.items())
    ]


def _python_source() -> list[Source]:
    """Return the standard library's modules, without its tests and installed packages."""
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    return [
        _file_source(f"python/{path.as_posix()}", library / path)
        for path in sorted(paths)
        if not skip & set(path.parts)
    ]


def _shakespeare() -> list[Source]:
    """Return Tiny Shakespeare, which is downloaded to the cache folder once."""
    path = cache_dir() / "shakespeare.txt"
    if is_cached := path.exists():
        content = path.read_bytes()
        name = str(path)
        fix = f"Remove {path}."
    else:
        name = f"The download from {SHAKESPEARE_URL}"
        fix = f"Put the file at {path}, or use `python-docs`, which needs no download."
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=20) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"Tiny Shakespeare could not be downloaded from {SHAKESPEARE_URL} ({error}).", fix
            ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise UserError(
            f"{name} is not Tiny Shakespeare: its SHA-256 is {digest[:16]}…, "
            f"not {SHAKESPEARE_SHA256[:16]}….",
            fix,
        )
    if not is_cached:
        with atomic_write(path) as tmp_path:
            tmp_path.write_bytes(content)
    return [_file_source("shakespeare", path)]


BUILT_IN: dict[str, Callable[[], list[Source]]] = {
    "python": _python_source,
    "python-docs": _python_docs,
    "shakespeare": _shakespeare,
}
