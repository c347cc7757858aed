"""The page during a training run, served by a process of its own.

Page requests therefore cannot change the results of training, and errors of the page do not end it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

# One of these variables is set if a browser opens in its own window, not in this terminal.
DISPLAY_VARIABLES = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")


@contextmanager
def dashboard_process(run: Path, on_ready: Callable[[str], None]) -> Iterator[None]:
    """Serve the page while the context is open, and show it in a browser if there is one.

    Args:
        run: An existing run folder; the page shows all runs in its parent folder.
        on_ready: Called with the page's URL, in another thread.
    """
    # A fork would copy the locks of other threads in their current states.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(run.absolute().parent, sender), daemon=True)
    process.start()
    sender.close()
    threading.Thread(target=_open_browser, args=(receiver, on_ready), daemon=True).start()
    try:
        yield
    finally:
        process.terminate()
        process.join(5)


def _open_browser(receiver: Connection, on_ready: Callable[[str], None]) -> None:
    """Wait for the page's URL, pass it on, and open it."""
    try:
        url = receiver.recv()
    except EOFError:  # The process ended after printing an error.
        return
    on_ready(url)
    has_display = any(os.environ.get(name) for name in DISPLAY_VARIABLES)
    if has_display or sys.platform in ("darwin", "win32"):
        with suppress(webbrowser.Error):
            webbrowser.open(url)


def _main(runs: Path, sender: Connection) -> None:
    """Serve the page in this process until the parent process ends."""
    # Ctrl-C is meant for training, whose end the page still shows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_serve, args=(runs, sender), daemon=True).start()
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()


def _serve(runs: Path, sender: Connection) -> None:
    from nanogpt.config import ServeConfig
    from nanogpt.errors import UserError
    from nanogpt.server.app import run
    from nanogpt.server.model_pool import ModelPool

    try:
        run(ModelPool(runs, ServeConfig(port=0)), on_ready=sender.send)
    except (UserError, OSError) as error:
        print(f"nanogpt: Cannot serve the page: {error}", file=sys.stderr)
    finally:
        sender.close()
