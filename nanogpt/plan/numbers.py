"""Numbers as a person says them."""

import math


def rounded(number: float) -> str:
    """Three digits of a number, as a person writes them."""
    digits = 2 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{round(number, digits):,.{max(0, digits)}f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24:,} days {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def size(number: float) -> str:
    """Bytes, tokens or parameters, as in 1.5 G."""
    power = min(5, max(0, math.floor(math.log10(number) / 3))) if number >= 1 else 0
    return f"{rounded(number / 1000**power)} {' kMGTP'[power]}".rstrip()
