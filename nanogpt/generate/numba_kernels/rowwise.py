"""Row-wise kernels: norms, softmax, activations, rotary embedding and quantization.

They work on float32 vectors, in place or into another of the same length. Shapes: C channels,
K inputs of a matmul, S positions, D channels per head.
"""

import math

import numpy as np

from nanogpt.generate.numba_kernels.microkernel import bitcast_f32, fmax_nnan, njit_cached

ZERO = np.float32(0)
HALF = np.float32(0.5)
ONE = np.float32(1)

# Limits of a quantized row: of each value, and of their sum, so that a dot product with int8
# weights stays below 2^31.
INT16_MAX = np.float32(32767)
MAX_ROW_SUM = np.float32(2e9 / 127)

LOG2_E = np.float32(1 / math.log(2))
LN_2_HIGH = np.float32(0.693359375)
LN_2_LOW = np.float32(math.log(2) - 0.693359375)
TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(8))

# What the compiler may assume to vectorize sums and maxima.
FASTMATH = {"reassoc", "contract", "nsz", "nnan"}


@njit_cached(fastmath={"contract"})
def exp(x):
    """Return e^x within 2 ulp, from 1e-38 to 1e38 (Cody and Waite 1980, chapter 6).

    A power of two times a Taylor series. Unlike the C library's function, loops over it vectorize.
    """
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN_2_HIGH - n * LN_2_LOW  # |r| <= ln(2) / 2
    series = TAYLOR[7]
    series = series * r + TAYLOR[6]
    series = series * r + TAYLOR[5]
    series = series * r + TAYLOR[4]
    series = series * r + TAYLOR[3]
    series = series * r + TAYLOR[2]
    series = series * r + ONE
    series = series * r + ONE
    return series * bitcast_f32(np.int32((np.int32(n) + 127) << 23))


@njit_cached(fastmath={"contract"})
def gelu(x):
    """Return the GELU of x, as `nanogpt.model.gelu`."""
    return x / (
        ONE + exp(-x * (np.float32(1.5957691216057308) + np.float32(0.07135481627260025) * x * x))
    )


@njit_cached(fastmath={"contract"})
def silu(x):
    """Return x * sigmoid(x)."""
    return x / (ONE + exp(-x))


@njit_cached(fastmath=FASTMATH)
def layer_norm(x, weight, bias, eps, out):
    """Normalize x (C,) into out (C,)."""
    total = ZERO
    for c in range(x.size):
        total += x[c]
    mean = total / np.float32(x.size)
    square = ZERO
    for c in range(x.size):
        square += (x[c] - mean) * (x[c] - mean)
    inverse_std = ONE / np.sqrt(square / np.float32(x.size) + eps)
    for c in range(x.size):
        out[c] = (x[c] - mean) * inverse_std * weight[c] + bias[c]


@njit_cached(fastmath=FASTMATH)
def rms_norm(x, weight, eps, out):
    """Normalize x (C,) into out (C,)."""
    square = ZERO
    for c in range(x.size):
        square += x[c] * x[c]
    inverse_rms = ONE / np.sqrt(square / np.float32(x.size) + eps)
    for c in range(x.size):
        out[c] = x[c] * inverse_rms * weight[c]


@njit_cached(fastmath=FASTMATH)
def absmax(x):
    """Return the largest absolute value of x (K,)."""
    result = ZERO
    for k in range(x.size):
        result = fmax_nnan(result, abs(x[k]))
    return result


@njit_cached(fastmath=FASTMATH)
def quantize_int16(x, out):
    """Quantize x (K,) to int16, or copy it if out (K,) is float32; return the scale.

    The scale is large enough that a dot product with int8 weights cannot overflow 32 bits.
    """
    if out.itemsize == 4:
        for k in range(x.size):
            out[k] = x[k]
        return ONE
    total = ZERO
    for k in range(x.size):
        total += abs(x[k])
    row_scale = max(absmax(x) / INT16_MAX, total / MAX_ROW_SUM)
    inverse = ONE / row_scale if row_scale > ZERO else ZERO
    for k in range(x.size):
        out[k] = np.int32(np.floor(x[k] * inverse + HALF))
    return row_scale


@njit_cached(fastmath=FASTMATH)
def quantize_int8(x, is_int8):
    """Round x (K,) in place to 8-bit integers if is_int8 is 1; return the scale."""
    if is_int8 == 0:
        return ONE
    row_scale = absmax(x) / np.float32(127)
    inverse = ONE / row_scale if row_scale > ZERO else ZERO
    for k in range(x.size):
        x[k] = np.floor(x[k] * inverse + HALF)
    return row_scale


@njit_cached(fastmath=FASTMATH)
def softmax(scores):
    """Replace scores (S,) by exp(score - max); return their sum."""
    max_score = scores[0]
    for s in range(scores.size):
        max_score = fmax_nnan(max_score, scores[s])
    for s in range(scores.size):
        scores[s] = exp(scores[s] - max_score)
    total = ZERO
    for s in range(scores.size):
        total += scores[s]
    return total


@njit_cached(fastmath={"contract"})
def apply_rotary_emb(x, cos, sin):
    """Rotate channels i and i + D/2 of x (D,) by the angles of cos and sin (D/2,)."""
    half = cos.size
    for i in range(half):
        x1, x2 = x[i], x[half + i]
        x[i] = x1 * cos[i] - x2 * sin[i]
        x[half + i] = x2 * cos[i] + x1 * sin[i]


@njit_cached(fastmath={"contract"})
def scale(x, factor, factors):
    """Multiply each x[k] by factor * factors[k]."""
    for k in range(x.size):
        x[k] *= factor * factors[k]
