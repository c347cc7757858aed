"""Atomic writes, file locks, free disk space and the cache folder.

A file or folder is written under a temporary name beside its target, synced and then renamed, so
that a killed process leaves the old version in place.
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
    """Return the folder of prepared tokens and downloads; `XDG_CACHE_HOME` moves it."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "nanogpt"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "nanogpt"
    return Path.home() / ".cache" / "nanogpt"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block succeeds.

    The block writes a file or a folder. A file replaces an existing one. A folder that another
    process has created meanwhile is kept, and the new one is dropped. After an error the temporary
    path is removed.

    Raises:
        UserError: The disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        yield tmp_path
        for file in [tmp_path, *tmp_path.rglob("*")] if tmp_path.is_dir() else [tmp_path]:
            _sync(file)
        if tmp_path.is_dir() and path.exists():
            return
        os.replace(tmp_path, path)
        _sync(path.parent)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(path) from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not path.is_dir():
            raise
    finally:
        remove(tmp_path)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file atomically."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8", newline="")


def remove_stale_temp_files(folder: Path, older_than: float) -> None:
    """Remove temporary files of killed processes, unmodified for `older_than` seconds."""
    for path in folder.glob(".*.unfinished"):
        # Another process may rename or remove the file at any moment.
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= older_than:
                remove(path)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock on a run folder, which the system releases when the process ends.

    Args:
        path: The lock file, inside the folder.

    Raises:
        UserError: Another process holds the lock.
    """
    # The import takes 0.1 s, and most commands need no lock.
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    # A generator may be closed in another thread than it was started in.
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        held = lock.acquire()
    except Timeout as error:
        raise UserError(
            f"Another process is training in {path.parent.absolute()}.",
            "Wait until it has finished, or choose another output folder.",
        ) from error
    with held:
        yield


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def require_space(path: Path, needed: int) -> None:
    """Raise `UserError` unless `needed` bytes are free on the disk of `path`."""
    candidates = [path.absolute(), *path.absolute().parents]
    usage = shutil.disk_usage(next(folder for folder in candidates if folder.exists()))
    # A virtual file system such as /proc has no size, and reports its own errors.
    if usage.total and usage.free < needed:
        raise disk_full_error(path, needed)


def is_disk_full(error: OSError) -> bool:
    """Return whether the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full_error(path: Path, needed: int | None = None) -> UserError:
    """Return the error for a full disk at `path`, where `needed` bytes were to be written."""
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    required = f"{needed / 1e6:,.1f} MB are needed" if needed is not None else "more is needed"
    return UserError(
        f"The disk is full: {free / 1e6:,.1f} MB are free for {path.absolute()}, {required}. "
        "Files saved earlier are unchanged.",
        "Free some space, or choose an output folder on another disk. "
        "Prepared text is cached in the folder that XDG_CACHE_HOME names.",
    )


def _sync(path: Path) -> None:
    # Windows has no handle on a folder to sync.
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
