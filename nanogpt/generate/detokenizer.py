"""Streaming detokenization: final text with every token, without stop strings."""

import codecs
from collections.abc import Sequence

from nanogpt.tokenizer.tokenizer import Tokenizer


class StreamingDetokenizer:
    """Converts tokens to text one at a time.

    Characters of several tokens are returned once complete. The end-of-text token and the first
    completed stop string end the text and are left out.

    Attributes:
        pending: Text that may turn out to be the start of a stop string.
        finished: True once the text has ended.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.token_bytes = tokenizer.token_bytes
        self.eot_id = tokenizer.eot_id
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.pending = ""
        self.finished = False

    def add(self, token_id: int) -> str:
        """Return the text that became final with this token; sets `finished` at the end."""
        if token_id == self.eot_id:
            self.finished = True
            return self.flush()
        new = self.decoder.decode(self.token_bytes[token_id])
        if not self.stop:
            return new
        self.pending += new
        matches = [(i, string) for string in self.stop if (i := self.pending.find(string)) >= 0]
        if matches:
            # A token can complete several stop strings: the one that ends first counts.
            self.finished = True
            return self.pending[: min((i + len(string), i) for i, string in matches)[1]]
        num_held = max(_overlap(self.pending, string) for string in self.stop)
        final = self.pending[: len(self.pending) - num_held]
        self.pending = self.pending[len(final) :]
        return final

    def flush(self) -> str:
        """Return the pending text when no token follows."""
        return self.pending + self.decoder.decode(b"", final=True)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that ends `text`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
