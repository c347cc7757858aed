"""The architecture: imports point strictly downwards, and what must be light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nanogpt"
LAYERS = [
    {"__main__"},
    {"cli"},
    {"serve", "sample"},
    {"library", "bench"},
    {"trainer", "finetune", "compare"},
    {"prepare", "recipe", "generate", "look", "report"},
    {"checkpoint", "evaluate", "plan"},
    {"data", "optim", "machine", "tokenizer", "model"},
    {"corpus", "config", "sizes"},
    {"files"},
    {"errors"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "nanogpt":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanogpt."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        assert imported(path) == {"library", "errors"}
        return
    module = path.relative_to(PACKAGE).with_suffix("").parts[0]  # the files of a folder are one module
    others = imported(path) - ({module} if path.parent != PACKAGE else set())
    assert not {name for name in others if name in LEVEL and LEVEL[name] <= LEVEL[module]}
    assert others <= set(LEVEL) | {"__version__"}


def test_help_needs_no_torch():
    code = "import sys; from nanogpt.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_server_begins_without_torch():
    subprocess.run([sys.executable, "-c", "import sys, nanogpt.serve; assert 'torch' not in sys.modules"], check=True)


def test_importing_the_library_door_needs_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, nanogpt; assert 'torch' not in sys.modules"], check=True)
