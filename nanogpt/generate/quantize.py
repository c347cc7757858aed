"""Weights in fewer bytes: the writing of text reads every weight once for each token, so that its speed is that of reading them.

In: a model. Out: its matrices, rounded to int8 or bfloat16, or as they are; and the model that has just these rounded weights, to be evaluated.
"""

import copy
from typing import Literal

import torch
from torch import Tensor

from nanogpt.model import GPT

Precision = Literal["int8", "bfloat16", "float32"]


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
def dequantized(model: GPT, precision: Precision) -> GPT:
    """A copy of the model whose products are with the weights of `rounded`: what an evaluation measures of it holds for `FastDecoder` with that precision."""
    model = copy.deepcopy(model)
    for weight in [*(model.get_parameter(name) for name in model.matrices()), head_matrix(model)]:
        integers, scale = rounded(weight, precision)
        weight.copy_(integers.float() * scale[:, None])
    return model


def head_matrix(model: GPT) -> Tensor:
    """The matrix (V, C) that makes the logits; in `classic` it is that of the embedding."""
    return model.wte.weight if model.config.arch == "classic" else model.head.weight
