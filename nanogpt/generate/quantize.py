"""Weights in fewer bytes: the writing of text reads every weight once for each token, so that its speed is that of reading them.

In: a model. Out: its matrices, rounded to int8 or bfloat16, or as they are; products with them; and the model that computes with what is rounded so, to be
evaluated.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.model import GPT, Block

Heads = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
Precision = Literal["int8", "bfloat16", "float32"]
IN_STEPS = 16  # of a row of weights: PyTorch's kernel reads so many at a time, also behind the end


def rounded(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """A matrix (N, K) of float32 as one of `precision` and a float32 scale (N,) for each output, which multiply to nearly the same.

    int8 is symmetric, rounded to nearest, and its largest in each row is 127 (Dettmers et al. 2022, "LLM.int8()", section 2.1); the others have scale 1.
    """
    if precision != "int8":
        return weight.to(getattr(torch, precision)), torch.ones(len(weight))
    scale = weight.abs().amax(dim=1) / 127
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
    return (weight / scale[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def product(weight: Tensor, bias: Tensor | None, precision: Precision) -> Callable[[Tensor], Tensor]:
    """The function x (..., K) -> x weight' + bias, (..., N), for a weight (N, K) that is kept in `precision`. With int8, on a CPU, what is multiplied
    and its sums are rounded to bfloat16, and each row of x comes out as if it were alone."""
    if precision != "int8":
        dtype: torch.dtype = getattr(torch, precision)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return lambda x: F.linear(x.to(dtype), weight, bias)
    numbers, scale = rounded(weight, precision)
    missing, one = -weight.shape[1] % IN_STEPS, torch.ones(len(weight), dtype=torch.bfloat16)
    return partial(_int8_product, weight=F.pad(numbers, (0, missing)), one=one, scale=scale, bias=bias, missing=missing)


def _int8_product(x: Tensor, weight: Tensor, one: Tensor, scale: Tensor, bias: Tensor | None, missing: int) -> Tensor:
    x, shape = (F.pad(x, (0, missing)) if missing else x), (*x.shape[:-1], len(weight))
    y = torch._weight_int8pack_mm(x.to(torch.bfloat16).reshape(-1, weight.shape[1]), weight, one).view(shape)
    return y * scale if bias is None else torch.addcmul(bias, y, scale)  # here, since the kernel would round the scales


@torch.no_grad()
def dequantized(model: GPT, precision: Precision) -> GPT:
    """A copy of the model whose products are with the weights of `rounded`, and for int8 with keys and values that are rounded alike: what an evaluation
    measures of it holds for `FastDecoder` with that precision, and nearly for `product`."""
    model = copy.deepcopy(model)
    for weight in [*(model.get_parameter(name) for name in model.matrices()), head_matrix(model)]:
        weight.copy_(_as_rounded(weight, precision))
    if precision == "int8":
        for block in cast(list[Block], list(model.blocks)):
            block.attn.heads = _with_rounded_cache(block.attn.heads)  # type: ignore[method-assign, assignment]
    return model


def _as_rounded(matrix: Tensor, precision: Precision) -> Tensor:
    numbers, scale = rounded(matrix, precision)
    return numbers.float() * scale[:, None]


def _with_rounded_cache(heads: Heads) -> Heads:
    """`Attention.heads` with keys and values (B, K, T, D) as an int8 cache keeps them: with a scale for each head of each token."""

    def rounding(x: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, *kept = heads(x, turn)
        k, v = (_as_rounded(part.reshape(-1, part.shape[3]), "int8").view(part.shape).type_as(part) for part in kept)
        return q, k, v

    return rounding


def head_matrix(model: GPT) -> Tensor:
    """The matrix (V, C) that makes the logits; in `classic` it is that of the embedding."""
    return model.wte.weight if model.config.arch == "classic" else model.head.weight
