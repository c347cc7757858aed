"""Text from a model: an engine that continues many texts at once, token by token.

In: a model and prompts with their settings. Out: pieces of text as soon as they are certain, with tokens and log-probabilities.

`filters` draws tokens, `decoder` runs the model and `fast` runs it faster, `text` spells, `engine` leads many texts through all three.
"""

from nanogpt.generate.decoder import Decoder, TorchDecoder, bare, open_decoder, remark
from nanogpt.generate.engine import Engine, Piece, Request, Text
from nanogpt.generate.quantize import dequantized
from nanogpt.generate.text import Ranges, Spelling, encode_prompt

__all__ = [
    "Decoder",
    "Engine",
    "Piece",
    "Ranges",
    "Request",
    "Spelling",
    "Text",
    "TorchDecoder",
    "bare",
    "dequantized",
    "encode_prompt",
    "open_decoder",
    "remark",
]
