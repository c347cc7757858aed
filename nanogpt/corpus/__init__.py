"""A person's text: where it lies (`sources`), what the files hold (`formats`), and how bytes become characters (`encoding`)."""

from nanogpt.corpus.sources import Source, expand, findable, is_prepared

__all__ = ["Source", "expand", "findable", "is_prepared"]
