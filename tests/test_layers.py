"""Tests of the architecture: imports point downwards, and light entry points stay light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanogpt"
# A module may import modules of lower rows, and modules further left in its own row. A name stands
# for all modules below it that have no row of their own.
LAYERS = """
__main__
cli
server
api
sweep
render convert
bench
training
inspection generate compare data.shards data.prepared data.prepare trackers
plan checkpoint
diagnosis evaluate baselines run_folder training.events
model data optim distributed
ops tokenizer device gpu_specs
config presets sizes splitmix
errors formatting files _version
"""
# Libraries for screens, pages and servers, and the packages that may import them.
EXTERNAL = {
    "rich": {"cli", "render"},
    "html": {"render"},
    "jinja2": {"render"},
    "plotly": {"render"},
    "fastapi": {"server"},
    "uvicorn": {"server"},
}
RANKS = {
    name: (-row, column)
    for row, line in enumerate(LAYERS.split("\n"))
    for column, name in enumerate(line.split())
}


def module_name(path: Path) -> str:
    """Return the dotted name of a source file, without a trailing __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
# What `nanogpt/__init__.py` offers, by the module that defines it.
DOOR = {
    "nanogpt.__version__": "nanogpt._version",
    "nanogpt.UserError": "nanogpt.errors",
    "nanogpt.load": "nanogpt.api",
    "nanogpt.train": "nanogpt.api",
}


def absolute_base(node: ast.ImportFrom, module: str) -> str:
    """Return the absolute name of the module in `from ... import`, relative ones included."""
    if not node.level:
        return node.module or ""
    package = module.split(".")
    if MODULES[module].name != "__init__.py":
        package.pop()
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *filter(None, [node.module])])


def imported_names(module: str) -> set[str]:
    """Return the absolute names that a module imports, anywhere in its source."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(node, module)
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "nanogpt":
            # A use after `import nanogpt`.
            names.add(f"nanogpt.{node.attr}")
    return names


def imported_modules(module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    modules = set()
    for name in imported_names(module) - {"nanogpt"}:
        if name in DOOR:
            modules.add(DOOR[name])
        elif name in MODULES:
            modules.add(name)
        elif name.startswith("nanogpt."):
            modules.add(name.rpartition(".")[0])
    return modules


def layer_of(module: str) -> str:
    """Return the longest name in LAYERS that the module belongs to."""
    name = module.removeprefix("nanogpt.")
    while name not in RANKS:
        name, dot, _ = name.rpartition(".")
        assert dot, f"{module} has no layer"
    return name


@pytest.mark.parametrize("module", [name for name in MODULES if name != "nanogpt"])
def test_imports_point_down(module):
    own = layer_of(module)
    layers = {name: layer_of(name) for name in imported_modules(module)}
    upward = {name for name, layer in layers.items() if layer != own and RANKS[layer] >= RANKS[own]}
    assert not upward


def test_package_door_imports_only_the_interface():
    names = {name.removeprefix("nanogpt.") for name in imported_modules("nanogpt")}
    assert names <= {"api", "errors", "_version"}


def test_modules_of_a_folder_have_no_cycles():
    graph = {module: imported_modules(module) for module in MODULES}
    # Raises a CycleError that names the modules of the cycle.
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_external_libraries_stay_in_their_layers(module):
    package = module.removeprefix("nanogpt.").split(".")[0]
    libraries = {name.split(".")[0] for name in imported_names(module)}
    assert not {name for name in libraries & EXTERNAL.keys() if package not in EXTERNAL[name]}


def run_python(code):
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_needs_no_torch():
    run_python(
        "import sys; from nanogpt.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )


def test_server_starts_without_torch():
    run_python("import sys, nanogpt.server.app; assert 'torch' not in sys.modules")


def test_importing_the_package_needs_no_torch():
    run_python("import sys, nanogpt; assert 'torch' not in sys.modules")
