"""HTML from the Jinja2 templates in `templates/`, in which every value is escaped."""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: object) -> str:
    """Return a template of `TEMPLATES`, filled with values.

    Args:
        template: Name of the file, such as `inspection/page.html`.
        values: Variables of the template. A missing one is an error. Text is escaped; HTML that
            must stay HTML is wrapped in `markupsafe.Markup`.
    """
    return environment().get_template(template).render(values)


@cache
def environment() -> "Environment":
    """Create the only Jinja2 environment; Jinja2 is imported at its first use."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    created = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    created.filters["show_whitespace"] = show_whitespace
    return created


def printable(text: str) -> str:
    """Replace control characters, which HTML forbids, by visible symbols."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", _symbol, text)


def show_whitespace(text: str) -> str:
    """Replace spaces, line ends and tabs by visible symbols."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def _symbol(match: re.Match[str]) -> str:
    """Return the picture of an ASCII control character (U+2400 block), or U+FFFD."""
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"
