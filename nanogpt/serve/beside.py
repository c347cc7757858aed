"""The page beside a training run: a server in a process of its own, so that whatever one asks of it, the training's numbers stay the same.

In: the run's folder. Out: the page's address, told as soon as it answers, and a browser that shows it where there is one.
Refuses: nothing: a page that cannot be had does not end a training.
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


@contextmanager
def page_beside(run: Path, on_ready: Callable[[str], None]) -> Iterator[None]:
    """While it lasts, serve the page of all the runs that lie beside `run`, which is there already; `on_ready` gets the address, in another thread."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks, but not the threads
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(run.absolute().parent, sender), daemon=True)
    process.start()
    sender.close()
    threading.Thread(target=_tell, args=(receiver, on_ready), daemon=True).start()
    try:
        yield
    finally:
        process.terminate()
        process.join(5)


def _tell(receiver: Connection, on_ready: Callable[[str], None]) -> None:
    """Wait for the address, pass it on, and open it."""
    try:
        address = receiver.recv()
    except EOFError:  # the process has ended, and said why
        return
    on_ready(address)
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")  # without one, the browser might be a program in this terminal
    if sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in screens):
        with suppress(webbrowser.Error):
            webbrowser.open(address)


def _serve(runs: Path, sender: Connection) -> None:
    """What the other process does, until the one that began it has ended, however that comes about."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which is shown to its end
    threading.Thread(target=_run, args=(runs, sender), daemon=True).start()
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()


def _run(runs: Path, sender: Connection) -> None:
    from nanogpt.config import ServeConfig
    from nanogpt.errors import UserError
    from nanogpt.serve import run
    from nanogpt.serve.models import Models

    try:
        run(Models(runs, ServeConfig(port=0)), runs, on_ready=sender.send)
    except (UserError, OSError) as error:
        print(f"nanogpt: There is no page: {error}", file=sys.stderr)
    finally:
        sender.close()
