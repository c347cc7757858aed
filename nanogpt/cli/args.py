"""Arguments of the command line that name texts, prompts and runs."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from nanogpt.config import Config
from nanogpt.errors import UserError

# Flags of commands that take no value; those of settings are added from the config.
FLAGS = {
    "--resume",
    "--overwrite",
    "--open",
    "--json",
    "--error-on-unknown",
    "--by-position",
    "--surprisal",
    "--attention",
    "--neurons",
    "--memorization",
}


@dataclass(frozen=True)
class PlanTarget:
    """The text and the machines of a plan.

    Attributes:
        text_bytes: Size of the text, for its preparation time and the number of epochs.
        gpu: A GPU by name, such as H100 or RTX 4090. [default: this machine]
        gpus_per_node: GPUs per machine.
        nodes: Number of machines.
        network: Network bandwidth of each machine, in Gbit/s. [default: the GPU's usual, or 100]
        price: Price per GPU-hour, in any currency.
    """

    text_bytes: int | None = None
    gpu: str | None = None
    gpus_per_node: int = 1
    nodes: int = 1
    network: float | None = None
    price: float | None = None


def move_stdin_dash_last(argv: list[str]) -> list[str]:
    """Move a lone "-" (standard input) behind "--", where cyclopts reads it as an argument.

    A "-" that is the value of an option stays where it is.
    """
    if "--" in argv:
        return argv
    flags = FLAGS | _boolean_setting_flags()

    def is_option_value(i: int) -> bool:
        previous = argv[i - 1]
        return previous.startswith("--") and "=" not in previous and previous not in flags

    dashes = [i for i, word in enumerate(argv) if word == "-" and not is_option_value(i)]
    if not dashes:
        return argv
    return [word for i, word in enumerate(argv) if i not in dashes] + ["--", "-"]


def _boolean_setting_flags() -> set[str]:
    names = [
        name.replace("_", "-")
        for section in Config.model_fields.values()
        for name, field in section.annotation.model_fields.items()  # type: ignore[union-attr]
        if field.annotation in (bool, bool | None)
    ]
    return {f"--{no}{name}" for name in names for no in ("", "no-")}


def read_prompt_file(name: str, encoding: str | None) -> str:
    """Return the text of a file, or of standard input for "-", without its last line end."""
    from nanogpt.data.sources import resolve_sources

    if name != "-" and not Path(name).is_file():
        raise UserError(
            f"No such prompt file: {Path(name).absolute()}.",
            'To give the prompt itself, use --prompt "...".',
        )
    text = "".join(resolve_sources([name], encoding)[0].iter_text())
    return text.removesuffix("\n").removesuffix("\r")


def read_text_argument(file: str | None, text: str | None, encoding: str | None) -> str:
    """Return `text`, or the text of a file or of standard input for "-"."""
    from nanogpt.data.sources import resolve_sources

    if (file is None) == (text is None):
        raise UserError(
            "No text to inspect." if file is None else "Both a file and --text were given.",
            'nanogpt inspect MODEL FILE, nanogpt inspect MODEL --text "...", '
            "or nanogpt sample MODEL | nanogpt inspect MODEL -",
        )
    if file is None:
        return text or ""
    try:
        sources = resolve_sources([file], encoding)
    except UserError as error:
        raise UserError(str(error), 'To inspect the words themselves, use --text "...".') from error
    return "".join(chunk for source in sources for chunk in source.iter_text())


def select_view(**flags: bool) -> str:
    """Return the one view of `nanogpt inspect` that was asked for; surprisal by default."""
    views = [name for name, is_set in flags.items() if is_set] or ["surprisal"]
    if len(views) > 1:
        listed = ", ".join(f"--{name}" for name in views)
        raise UserError(f"More than one view: {listed} (limit 1).", "Ask for one at a time.")
    return views[0]


def default_run_name(text: str) -> str:
    """Return a run name after the first text, in characters that every file system allows."""
    from nanogpt.data.formats import is_compressed

    path = Path("stdin" if text == "-" else text).resolve()
    name = Path(path.stem).stem if is_compressed(path.name) else path.stem
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "text"


def restore_sigpipe() -> None:
    """Let `nanogpt sample ... | head` end with its reader, without a traceback."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
