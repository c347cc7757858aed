"""What the README and the docs tell people to type is what the command line takes: every command in a block of code is parsed, none is run. And what they
tell people to read is there: files, and the functions and classes named behind them."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
import types
from itertools import groupby
from pathlib import Path

import pytest
from conftest import TINY

from nanogpt.cli import app
from nanogpt.cli.words import dash_last

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
    app.parse_args(dash_last(words), exit_on_error=False, print_error=False)


@pytest.mark.parametrize("script", [script for _, script in SCRIPTS if script.startswith("#!/bin/bash")])
def test_a_script_of_the_docs_is_bash(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("document", "words"), BENCHMARKS, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_a_benchmark_of_the_docs_parses(document, words, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / words[0]))
    script["app"].parse_args(words[1:], exit_on_error=False, print_error=False)


def test_a_flag_that_is_not_there_does_not_parse():
    ((words,),) = [list(commands("```sh\nnanogpt train book.txt --n-layers 3  # a comment\n```\n"))]
    with pytest.raises(Exception, match="--n-layers"):
        app.parse_args(words[1:], exit_on_error=False, print_error=False)


REFERENCE = re.compile(r"`((?:nanogpt|tests|docs|benchmarks)/[\w./-]*)`(?::((?:,?\s`[\w.]+`)+))?")  # a path, and perhaps names in it
REFERENCES = [(path.name, *found) for path in DOCUMENTS for found in REFERENCE.findall(path.read_text(encoding="utf-8"))]


def defined(path):
    """The functions, classes and constants of a file, and the methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)}
        names |= {getattr(node, "name", "")} | {target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)}
    return names


def test_there_are_references_to_check():
    assert sum(len(names.split()) for document, _, names in REFERENCES if document == "how-it-works.md") > 40


@pytest.mark.parametrize(("document", "path", "names"), REFERENCES)
def test_what_the_docs_tell_to_read_is_there(document, path, names):
    assert (ROOT / path).exists()
    if names:
        missing = set(re.findall(r"[\w.]+", names)) - defined(ROOT / path)
        assert not missing, f"{document}: {path} has no {missing}"


def test_a_name_that_is_not_there_is_missed():
    assert REFERENCE.findall("`nanogpt/model.py`: `GPT.nats`, `Nothing`; `nanogpt/data.py`") == [
        ("nanogpt/model.py", " `GPT.nats`, `Nothing`"),
        ("nanogpt/data.py", ""),
    ]
    assert defined(ROOT / "nanogpt" / "model.py") >= {"GPT.nats", "GPT", "rotate"}
    assert "Nothing" not in defined(ROOT / "nanogpt" / "model.py")


def test_the_notebook_runs(story, tmp_path, monkeypatch, capsys):
    """Its cells of code, one after the other, as they stand, but on a small text and for a few steps."""
    notebook = json.loads((ROOT / "docs" / "first-steps.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    frames = types.ModuleType("IPython.display")
    frames.IFrame = lambda source, width, height: (tmp_path / source).read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", frames)
    monkeypatch.chdir(tmp_path)
    few = ", ".join(f"{name}={value!r}" for name, value in (TINY | {"steps": 4, "eval_every": 2, "context_length": 64}).items())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum('"python-docs"' in cell and "minutes=5" in cell for cell in cells) == 1
    scope = {}
    for cell in cells:
        exec(cell.replace('"python-docs"', repr(str(story))).replace("minutes=5", few), scope)
    assert scope["surprise"].total_bits == pytest.approx(sum(scope["surprise"].bits))
    assert "step 4: validation loss" in capsys.readouterr().out
