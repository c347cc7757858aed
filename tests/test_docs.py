"""The docs are current: every command parses, every script is valid, every named file exists."""

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from itertools import groupby
from pathlib import Path

import pytest
from helpers import TINY

from nanogpt.cli.app import app
from nanogpt.cli.args import move_stdin_dash_last

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# A nanogpt command in a script, possibly behind torchrun or ssh.
INNER = re.compile(r"(?:-m |bin/|^)nanogpt ((?:[a-z]+ )[^>|&)\n]*)", re.M)
CHAINS = {"|", "||", "&&", ";", "&", "do"}


def commands(markdown):
    """Yield the words of each command: lines of sh blocks, and "$ " lines of unmarked blocks."""
    for language, block in BLOCK.findall(markdown):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "sh") else ():
            if language or line.startswith("$ "):
                # A shell variable stands for a number.
                line = re.sub(r"\$\w+", "1", line.removeprefix("$ "))
                words = shlex.shlex(line, posix=True, punctuation_chars="|&;")
                words.whitespace_split = True
                for chained, part in groupby(words, CHAINS.__contains__):
                    if not chained:
                        yield list(part)


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (path.name, words) for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8"))
]
OWN = [(name, words[1:]) for name, words in COMMANDS if Path(words[0]).name == "nanogpt"]
OWN += [
    (name, words[words.index("nanogpt") + 1 :])
    for name, words in COMMANDS
    if words[0] == "torchrun"
]
SCRIPTS = [
    (path.name, script)
    for path in DOCUMENTS
    for language, script in BLOCK.findall(path.read_text(encoding="utf-8"))
    if language in ("bash", "ini")
]
OWN += [
    (name, re.sub(r"\$\w+", "1", words.replace('"', "")).split())
    for name, script in SCRIPTS
    for words in INNER.findall(script.replace("\\\n", " "))
]
BENCHMARKS = [
    (name, words[1:])
    for name, words in COMMANDS
    if words[1:] and Path(words[0]).name == "python" and words[1].startswith("benchmarks/")
]


def test_docs_have_commands():
    assert len(OWN) > 10
    assert len(BENCHMARKS) > 2


@pytest.mark.parametrize(
    ("document", "words"), OWN, ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_docs_commands_parse(document, words):
    assert words, f"{document} has a lone nanogpt"
    app.parse_args(move_stdin_dash_last(words), exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    "script", [script for _, script in SCRIPTS if script.startswith("#!/bin/bash")]
)
def test_docs_scripts_are_valid_bash(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("document", "words"),
    BENCHMARKS,
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_docs_benchmark_commands_parse(document, words, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / words[0]))
    script["app"].parse_args(words[1:], exit_on_error=False, print_error=False)


def test_unknown_flag_does_not_parse():
    ((words,),) = [list(commands("```sh\nnanogpt train book.txt --n-layers 3  # a comment\n```\n"))]
    with pytest.raises(Exception, match="--n-layers"):
        app.parse_args(words[1:], exit_on_error=False, print_error=False)


# A path, and perhaps names in it.
REFERENCE = re.compile(r"`((?:nanogpt|tests|docs|benchmarks)/[\w./-]*)`(?::((?:,?\s`[\w.]+`)+))?")
REFERENCES = [
    (path.name, *found)
    for path in DOCUMENTS
    for found in REFERENCE.findall(path.read_text(encoding="utf-8"))
]


def defined(path):
    """Return the functions, classes and constants of a file, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        names |= {getattr(node, "name", "")} | {
            target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)
        }
    return names


def test_docs_have_references():
    assert (
        sum(
            len(names.split()) for document, _, names in REFERENCES if document == "how-it-works.md"
        )
        > 40
    )


@pytest.mark.parametrize(("document", "path", "names"), REFERENCES)
def test_docs_references_exist(document, path, names):
    assert (ROOT / path).exists()
    if names:
        missing = set(re.findall(r"[\w.]+", names)) - defined(ROOT / path)
        assert not missing, f"{document}: {path} has no {missing}"


def test_missing_name_is_detected():
    assert REFERENCE.findall("`nanogpt/model.py`: `GPT.loss_sum`, `Nothing`; `nanogpt/ops.py`") == [
        ("nanogpt/model.py", " `GPT.loss_sum`, `Nothing`"),
        ("nanogpt/ops.py", ""),
    ]
    assert defined(ROOT / "nanogpt" / "model.py") >= {"GPT.loss_sum", "GPT", "apply_rotary_emb"}
    assert "Nothing" not in defined(ROOT / "nanogpt" / "model.py")


def test_notebook_runs(story, tmp_path, monkeypatch, capsys):
    """Run the code cells in order, on a small text and for a few steps."""
    notebook = json.loads((ROOT / "docs" / "first-steps.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    frames = types.ModuleType("IPython.display")
    frames.IFrame = lambda source, width, height: (tmp_path / source).read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", frames)
    monkeypatch.chdir(tmp_path)
    few = ", ".join(
        f"{name}={value!r}"
        for name, value in (TINY | {"steps": 4, "eval_every": 2, "context_length": 64}).items()
    )
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum('"python-docs"' in cell and "minutes=5" in cell for cell in cells) == 1
    scope = {}
    for cell in cells:
        exec(cell.replace('"python-docs"', repr(str(story))).replace("minutes=5", few), scope)
    assert scope["surprisal"].total_bits == pytest.approx(sum(scope["surprisal"].bits))
    assert "step 4: validation loss" in capsys.readouterr().out


def test_architecture_page_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    script = runpy.run_path(str(ROOT / "docs" / "make_architecture.py"))
    for path, render in ((script["SVG"], "render_svg"), (script["PAGE"], "render_page")):
        assert path.read_text(encoding="utf-8") == script[render](), path.name


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_page_functions():
    command = ["node", "--test", str(ROOT / "tests" / "page.test.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Cannot use import statement outside a module" in done.stdout + done.stderr:
        pytest.skip("this node reads .js files as CommonJS")
    assert done.returncode == 0, done.stdout
