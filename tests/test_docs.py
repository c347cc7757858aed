"""What the README and the docs tell people to type is what the command line takes: every command in a block of code is parsed, none is run."""

import re
import runpy
import shlex
import subprocess
from itertools import groupby
from pathlib import Path

import pytest

from nanogpt.cli import _dash_last, app

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # all of them, or the end of one would be taken for the beginning of another
INNER = re.compile(r"(?:-m |bin/|^)nanogpt ((?:[a-z]+ )[^>|&)\n]*)", re.M)  # the words of nanogpt in a script, behind torchrun or ssh
CHAINS = {"|", "||", "&&", ";", "&", "do"}


def commands(markdown):
    """The words of each command: of every line of a block marked sh, and of the lines behind a "$ " in one without a mark."""
    for language, block in BLOCK.findall(markdown):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "sh") else ():
            if language or line.startswith("$ "):
                line = re.sub(r"\$\w+", "1", line.removeprefix("$ "))  # a variable stands for a number
                words = shlex.shlex(line, posix=True, punctuation_chars="|&;")
                words.whitespace_split = True
                for chained, part in groupby(words, CHAINS.__contains__):
                    if not chained:
                        yield list(part)


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [(path.name, words) for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8"))]
OWN = [(name, words[1:]) for name, words in COMMANDS if Path(words[0]).name == "nanogpt"]
OWN += [(name, words[words.index("nanogpt") + 1 :]) for name, words in COMMANDS if words[0] == "torchrun"]
SCRIPTS = [(path.name, script) for path in DOCUMENTS for language, script in BLOCK.findall(path.read_text(encoding="utf-8")) if language in ("bash", "ini")]
OWN += [(name, re.sub(r"\$\w+", "1", words.replace('"', "")).split()) for name, script in SCRIPTS for words in INNER.findall(script.replace("\\\n", " "))]
BENCHMARKS = [(name, words[1:]) for name, words in COMMANDS if words[1:] and Path(words[0]).name == "python" and words[1].startswith("benchmarks/")]


def test_there_are_commands_to_check():
    assert len(OWN) > 10
    assert len(BENCHMARKS) > 2


@pytest.mark.parametrize(("document", "words"), OWN, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_a_command_of_the_docs_parses(document, words):
    assert words, f"{document} has a lone nanogpt"
    app.parse_args(_dash_last(words), exit_on_error=False, print_error=False)


@pytest.mark.parametrize("script", [script for _, script in SCRIPTS if script.startswith("#!/bin/bash")])
def test_a_script_of_the_docs_is_bash(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("document", "words"), BENCHMARKS, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_a_benchmark_of_the_docs_parses(document, words):
    script = runpy.run_path(str(ROOT / words[0]))
    script["app"].parse_args(words[1:], exit_on_error=False, print_error=False)


def test_a_flag_that_is_not_there_does_not_parse():
    ((words,),) = [list(commands("```sh\nnanogpt train book.txt --n-layers 3  # a comment\n```\n"))]
    with pytest.raises(Exception, match="--n-layers"):
        app.parse_args(words[1:], exit_on_error=False, print_error=False)
