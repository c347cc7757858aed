"""Weight quantization for decoding, which is bound by the memory bandwidth of the weights."""

import copy
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.model import GPT, Block

ProjectQKV = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
Precision = Literal["int8", "bfloat16", "float32"]

# PyTorch's int8 kernel reads rows of weights in multiples of 16, past the end of a shorter row.
K_MULTIPLE = 16


def quantize(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Quantize a float32 matrix (N, K) to weights (N, K) and a float32 scale (N,) per row.

    int8 is symmetric, rounded to nearest, with 127 for the largest of each row (Dettmers et al.
    2022, "LLM.int8()", section 2.1). Floating-point weights have scale 1.
    """
    if precision != "int8":
        return weight.to(getattr(torch, precision)), torch.ones(len(weight))
    scale = weight.abs().amax(dim=1) / 127
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
    return (weight / scale[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def make_linear(
    weight: Tensor, bias: Tensor | None, precision: Precision
) -> Callable[[Tensor], Tensor]:
    """Return a linear layer as a function, with the weights stored in `precision`.

    In int8, on a CPU, inputs and sums are rounded to bfloat16, and a row does not depend on the
    others of its batch.

    Args:
        weight: (N, K) float32.
        bias: (N,) float32 or None.
        precision: Type of the stored weights.

    Returns:
        A function from (..., K) to (..., N).
    """
    if precision != "int8":
        dtype: torch.dtype = getattr(torch, precision)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        return lambda x: F.linear(x.to(dtype), weight, bias)
    q_weight, scale = quantize(weight, precision)
    N, K = weight.shape
    padding = -K % K_MULTIPLE
    q_weight = F.pad(q_weight, (0, padding))
    unit_scale = torch.ones(N, dtype=torch.bfloat16)

    def int8_linear(x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], N)
        if padding:
            x = F.pad(x, (0, padding))
        rows = x.to(torch.bfloat16).reshape(-1, K + padding)
        y = torch._weight_int8pack_mm(rows, q_weight, unit_scale).view(shape)
        # Scaled here in float32, because the kernel takes only bfloat16 scales.
        return y * scale if bias is None else torch.addcmul(bias, y, scale)

    return int8_linear


@torch.no_grad()
def fake_quantize(model: GPT, precision: Precision) -> GPT:
    """Return a copy of the model that computes with quantized weights, to evaluate their loss.

    For int8, keys and values are quantized too. The result is that of `NumbaDecoder` in the same
    precision up to rounding, and close to that of `make_linear`.
    """
    model = copy.deepcopy(model)
    matrices = [model.get_parameter(name) for name in model.muon_param_splits()]
    # Tied embeddings are quantized with the head, so fold their normalization in first.
    model.wte.weight.copy_(model.embedding_table())
    model.normalize_embedding = False
    for weight in [*matrices, model.head_weight()]:
        weight.copy_(_fake_quantize(weight, precision))
    if precision == "int8":
        for block in cast(list[Block], list(model.blocks)):
            quantized: Any = _fake_quantize_kv(block.attn.project_qkv)
            block.attn.project_qkv = quantized  # type: ignore[method-assign]
    return model


def _fake_quantize(matrix: Tensor, precision: Precision) -> Tensor:
    q_weight, scale = quantize(matrix, precision)
    return q_weight.float() * scale[:, None]


def _fake_quantize_kv(project_qkv: ProjectQKV) -> ProjectQKV:
    """Wrap a QKV projection: round keys and values (B, H, T, D) as an int8 cache stores them."""

    def project(x: Tensor, cos_sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = project_qkv(x, cos_sin)
        return q, _fake_quantize_rows(k), _fake_quantize_rows(v)

    return project


def _fake_quantize_rows(x: Tensor) -> Tensor:
    return _fake_quantize(x.reshape(-1, x.shape[3]), "int8").view(x.shape).type_as(x)
