"""Text for readers: numbers, durations, command-line flags and sanitized text."""

import math
import shlex
from collections.abc import Mapping


def format_sig(number: float) -> str:
    """Return a number with three significant digits, such as 98,800 or 0.000123."""
    digits = 2 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{round(number, digits):,.{max(0, digits)}f}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as 3 h 20 min or 45 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24:,} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def format_si(number: float) -> str:
    """Return a number with three significant digits and an SI prefix, such as 1.50 G.

    A unit can follow directly: `format_si(2e9) + "B"` is 2.00 GB.
    """
    power = min(5, max(0, math.floor(math.log10(number) / 3))) if number >= 1 else 0
    return f"{format_sig(number / 1000**power)} {' kMGTP'[power]}".rstrip()


def format_flags(settings: Mapping[str, object]) -> str:
    """Return settings as command-line flags, each with its value."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join(flags)


def sanitize(text: str) -> str:
    """Return text whose control characters are replaced and harmless to a terminal.

    Newlines and tabs stay. Characters below U+0020 become their Unicode control pictures, and
    other unprintable characters become U+FFFD.
    """

    def visible(char: str) -> str:
        if char in "\n\t" or char.isprintable():
            return char
        return chr(0x2400 + ord(char)) if char < " " else "\ufffd"

    return "".join(map(visible, text))
