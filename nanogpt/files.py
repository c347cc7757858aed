"""Files that are whole or absent: every file and folder that Nano-GPT writes comes to its name through here.

In: a path and a way to fill it. Out: the finished file or folder, on disk, under its name; a killed process leaves the old one.
Refuses: to begin what does not fit on the disk.
"""

import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanogpt.errors import UserError


def cache_dir() -> Path:
    """The folder for what can be made again: prepared tokens and downloads. `XDG_CACHE_HOME` moves it."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "nanogpt"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "nanogpt"
    return Path.home() / ".cache" / "nanogpt"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new name beside `path` to write a file or a folder at; when the block ends well, sync it and rename it to `path`.

    A file replaces the old one. A folder needs a free name; if another process took it meanwhile, with the same content, ours is dropped.
    Errors: `UserError` when the disk is full. Whatever happens, nothing half-written is left under either name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        yield unfinished
        for file in [unfinished, *unfinished.rglob("*")] if unfinished.is_dir() else [unfinished]:
            _sync(file)
        if unfinished.is_dir() and path.exists():
            return
        os.replace(unfinished, path)
        _sync(path.parent)
    except OSError as error:
        if is_full(error):
            raise disk_full(path) from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not path.is_dir():
            raise
    finally:
        discard(unfinished)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file, whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="")


def sweep(folder: Path, older_than: float) -> None:
    """Remove what killed processes left unfinished in a folder more than so many seconds ago."""
    for path in folder.glob(".*.unfinished"):
        with suppress(FileNotFoundError):  # somebody else finished or removed it
            if time.time() - path.stat().st_mtime >= older_than:
                discard(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system gives back when the process ends, however it ends. Errors: `UserError` if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"Another process is training in {path.parent.absolute()}.", "Wait for it, or choose another folder: --out FOLDER.") from error
        yield


def discard(path: Path) -> None:
    """Remove a file or a folder that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def require_space(path: Path, needed: int) -> None:
    """Raise `UserError` unless `needed` bytes are free where `path` is or will be."""
    existing = next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())
    usage = shutil.disk_usage(existing)
    if usage.total and usage.free < needed:  # what has no size, such as /proc, is no disk: it says itself what it refuses
        raise disk_full(path, needed)


def is_full(error: OSError) -> bool:
    """Whether the disk, or what a person may use of it, had no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(path: Path, needed: int | None = None) -> UserError:
    """What to say when the disk at `path` has no room, for so many bytes or at all."""
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    wanted = f"{needed / 1e6:,.1f} MB are needed" if needed is not None else "more is needed"
    return UserError(
        f"The disk is full: {free / 1e6:,.1f} MB are free for {path.absolute()}, {wanted}. What was saved before is untouched.",
        "Free some space, or write elsewhere with --out FOLDER (prepared text goes to the folder XDG_CACHE_HOME names).",
    )


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":  # Windows has no handle on a folder to sync
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
