"""Write docs/architecture.svg and the table in docs/architecture.md from the code.

The layers are those that tests/test_layers.py enforces. Run it after a change of modules:
`python docs/make_architecture.py`.
"""

import ast
import html
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_layers import LAYERS, MODULES, imported_modules, layer_of  # noqa: E402

SVG = ROOT / "docs" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- modules: generated -->\n", "<!-- end of modules -->"
WIDTH, ROW_HEIGHT, BOX_HEIGHT, CHAR_WIDTH, GAP = 980, 64, 30, 7.4, 14
# `sweep` and `convert` have a row before they have a file.
STYLE = """
text { font: 13px ui-monospace, Menlo, Consolas, monospace; fill: #1f1d1a }
rect { fill: #ffffff; stroke: #8f8a82 }
path { fill: none; stroke: #2f6fae; stroke-opacity: 0.22 }
@media (prefers-color-scheme: dark) {
  text { fill: #eceae6 } rect { fill: #1c1b19 } path { stroke: #6fa8dc }
}
"""


def layer_rows() -> list[list[str]]:
    """Return the names of each row that have modules, from top to bottom."""
    used = {layer_of(module) for module in MODULES if module != "nanogpt"}
    rows = [[name for name in line.split() if name in used] for line in LAYERS.splitlines()]
    return [row for row in rows if row]


def place_boxes(rows: list[list[str]]) -> dict[str, tuple[float, float, float]]:
    """Return the left edge, top and width of each box, with centred rows."""
    boxes = {}
    for number, row in enumerate(rows):
        widths = [CHAR_WIDTH * len(name) + 20 for name in row]
        x = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2
        for name, width in zip(row, widths, strict=True):
            boxes[name] = (x, 10 + number * ROW_HEIGHT, width)
            x += width + GAP
    return boxes


def layer_imports() -> dict[str, set[str]]:
    """Return the layers that each layer imports."""
    edges = defaultdict(set)
    for module in MODULES:
        if module == "nanogpt":
            continue
        layer = layer_of(module)
        edges[layer] |= {layer_of(name) for name in imported_modules(module)} - {layer}
    return edges


def render_svg() -> str:
    """Return the picture: a box per layer, a line per import between layers."""
    rows = layer_rows()
    boxes = place_boxes(rows)
    parts = []
    for source, targets in sorted(layer_imports().items()):
        x, y, width = boxes[source]
        for target in sorted(targets):
            u, v, other = boxes[target]
            start_x, end_x = x + width / 2, u + other / 2
            if v == y:  # in the same row, an arc below the boxes
                low = y + BOX_HEIGHT
                curve = f"M{start_x:.0f},{low} Q{(start_x + end_x) / 2:.0f},{low + 26} "
                curve += f"{end_x:.0f},{low}"
            else:
                start_y, middle = y + BOX_HEIGHT, (y + BOX_HEIGHT + v) / 2
                curve = f"M{start_x:.0f},{start_y} C{start_x:.0f},{middle:.0f} "
                curve += f"{end_x:.0f},{middle:.0f} {end_x:.0f},{v}"
            parts.append(f'<path d="{curve}"/>')
    for name, (x, y, width) in boxes.items():
        parts.append(
            f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="6"/>'
            f'<text x="{x + width / 2:.0f}" y="{y + 20}" text-anchor="middle">{name}</text>'
        )
    height = ROW_HEIGHT * len(rows)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>The layers of nanogpt; every import points downwards.</title>",
            f"<style>{STYLE}</style>",
            *parts,
            "</svg>\n",
        ]
    )


def render_table() -> str:
    """Return a Markdown table of all modules with the first sentence of their docstring."""
    lines = ["| module | contents |", "|---|---|"]
    for row in layer_rows():
        for layer in row:
            for module, path in MODULES.items():
                if module == "nanogpt" or layer_of(module) != layer:
                    continue
                summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                sentence = " ".join(summary.split("\n\n")[0].split())
                if path.name != "__init__.py":
                    name = path.relative_to(ROOT / "nanogpt").as_posix()
                    lines.append(f"| `{name}` | {html.escape(sentence, quote=False)} |")
    return "\n".join(lines) + "\n"


def render_page() -> str:
    """Return docs/architecture.md with a current table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + render_table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    SVG.write_text(render_svg(), encoding="utf-8")
    PAGE.write_text(render_page(), encoding="utf-8")
