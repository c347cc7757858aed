"""What words of a command line mean: texts, prompts, and what a run is called.

In: words. Out: text, or other words. Refuses: files that are not there, and two texts where one is meant.
"""

import re
import signal
from pathlib import Path

from nanogpt.config import Config
from nanogpt.errors import UserError


def dash_last(words: list[str]) -> list[str]:
    """Put a lone "-", standard input, behind "--", where cyclopts takes it for a text and not for an option."""
    settings = [(name, field) for section in Config.model_fields.values() for name, field in section.annotation.model_fields.items()]  # type: ignore[union-attr]
    yes_or_no = [name.replace("_", "-") for name, field in settings if field.annotation in (bool, bool | None)]
    alone = {"--resume", "--overwrite", "--json", "--strict", "--by-position", "--open", "--surprise", "--attention", "--neurons", "--copies"}
    alone |= {f"--{no}{name}" for name in yes_or_no for no in ("", "no-")}
    texts = [i for i, word in enumerate(words) if word == "-" and (not words[i - 1].startswith("--") or "=" in words[i - 1] or words[i - 1] in alone)]
    if not texts or "--" in words:
        return words
    return [word for i, word in enumerate(words) if i not in texts] + ["--", "-"]


def prompt_in(name: str, encoding: str | None) -> str:
    """The text of a file, or of standard input for "-"; the line end that an editor puts behind the last line is not part of it."""
    from nanogpt.corpus import expand

    if name != "-" and not Path(name).is_file():
        raise UserError(f"There is no prompt file {Path(name).absolute()}.", 'Give the prompt itself with --prompt "...".')
    return "".join(expand([name], encoding)[0].chunks()).removesuffix("\n").removesuffix("\r")


def text_itself(file: str | None, text: str | None, encoding: str | None) -> str:
    """The text of a file, of standard input for "-", or what was given instead."""
    from nanogpt.corpus import expand

    if (file is None) == (text is None):
        what = "Which text?" if file is None else "Both a file and --text were given."
        raise UserError(what, 'nanogpt look MODEL FILE, nanogpt look MODEL --text "...", or nanogpt sample MODEL | nanogpt look MODEL -')
    if file is None:
        return text or ""
    try:
        sources = expand([file], encoding)
    except UserError as error:
        raise UserError(str(error), 'To look at these words themselves: --text "...".') from error
    return "".join(chunk for source in sources for chunk in source.chunks())


def name_of_run(text: str) -> str:
    """What a run is called when nobody named it: as its first text, in characters that every system allows in a file name."""
    from nanogpt.corpus.formats import is_packed

    path = Path("stdin" if text == "-" else text).resolve()
    name = Path(path.stem).stem if is_packed(path.name) else path.stem
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "text"


def end_quietly_with_the_reader() -> None:
    """`nanogpt sample … | head` ends with head, without a traceback."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
