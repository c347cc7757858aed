"""What the README and the docs tell people to type is what the command line takes: every command in a block of code is parsed, none is run."""

import re
import runpy
import shlex
from itertools import groupby
from pathlib import Path

import pytest

from nanogpt.cli import _dash_last, app

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(sh)?\n(.*?)^```", re.M | re.S)  # others, such as Python, are not commands
CHAINS = {"|", "||", "&&", ";", "&", "do"}


def commands(markdown):
    """The words of each command: of every line of a block marked sh, and of the lines behind a "$ " in one without a mark."""
    for shell, block in BLOCK.findall(markdown):
        for line in block.replace("\\\n", " ").splitlines():
            if shell or line.startswith("$ "):
                line = re.sub(r"\$\w+", "1", line.removeprefix("$ "))  # a variable stands for a number
                words = shlex.shlex(line, posix=True, punctuation_chars="|&;")
                words.whitespace_split = True
                for chained, part in groupby(words, CHAINS.__contains__):
                    if not chained:
                        yield list(part)


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [(path.name, words) for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8"))]
OWN = [(name, words[1:]) for name, words in COMMANDS if Path(words[0]).name == "nanogpt"]
BENCHMARKS = [(name, words[1:]) for name, words in COMMANDS if words[1:] and Path(words[0]).name == "python" and words[1].startswith("benchmarks/")]


def test_there_are_commands_to_check():
    assert len(OWN) > 10
    assert len(BENCHMARKS) > 2


@pytest.mark.parametrize(("document", "words"), OWN, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_a_command_of_the_docs_parses(document, words):
    assert words, f"{document} has a lone nanogpt"
    app.parse_args(_dash_last(words), exit_on_error=False, print_error=False)


@pytest.mark.parametrize(("document", "words"), BENCHMARKS, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_a_benchmark_of_the_docs_parses(document, words):
    script = runpy.run_path(str(ROOT / words[0]))
    script["app"].parse_args(words[1:], exit_on_error=False, print_error=False)


def test_a_flag_that_is_not_there_does_not_parse():
    ((words,),) = [list(commands("```sh\nnanogpt train book.txt --n-layers 3  # a comment\n```\n"))]
    with pytest.raises(Exception, match="--n-layers"):
        app.parse_args(words[1:], exit_on_error=False, print_error=False)
