"""What is done to one row of numbers, compiled by Numba: normalisation, softmax, activations, rotation, and rounding to integers.

In: vectors of float32. Out: the same in place, or another as long. C channels, K numbers that a product multiplies, S positions, D channels per head.
"""

import math

import numpy as np

from nanogpt.generate.tile import as_float, compiled, larger

one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)
MOST, MOST_OF_ALL = np.float32(32767), np.float32(2e9 / 127)  # of a row of integers: each, and the sum of all
LOG2_E, LN_2_HIGH, LN_2_LOW = np.float32(1 / math.log(2)), np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(8))
SUMS = {"reassoc", "contract", "nsz", "nnan"}  # what a compiler may take for granted to add up, or find the largest, in vectors


@compiled(fastmath={"contract"})
def exp(x):
    """e^x, within 2 units in the last place, from 1e-38 to 1e38: a power of two and a Taylor series (Cody and Waite 1980, chapter 6).

    A loop over it becomes vectors, which one over the C library's does not.
    """
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * LOG2_E + half)
    r = x - n * LN_2_HIGH - n * LN_2_LOW  # at most ln(2) / 2 from 0
    series = TAYLOR[7]
    series = series * r + TAYLOR[6]
    series = series * r + TAYLOR[5]
    series = series * r + TAYLOR[4]
    series = series * r + TAYLOR[3]
    series = series * r + TAYLOR[2]
    series = series * r + one
    series = series * r + one
    return series * as_float(np.int32((np.int32(n) + 127) << 23))


@compiled(fastmath={"contract"})
def gelu(x):
    """See `model.gelu`."""
    return x / (one + exp(-x * (np.float32(1.5957691216057308) + np.float32(0.07135481627260025) * x * x)))


@compiled(fastmath={"contract"})
def silu(x):
    return x / (one + exp(-x))


@compiled(fastmath=SUMS)
def layer_norm(x, weight, bias, epsilon, out):
    """x (C,) -> out (C,)."""
    total = zero
    for c in range(x.size):
        total += x[c]
    mean = total / np.float32(x.size)
    square = zero
    for c in range(x.size):
        square += (x[c] - mean) * (x[c] - mean)
    scale = one / np.sqrt(square / np.float32(x.size) + epsilon)
    for c in range(x.size):
        out[c] = (x[c] - mean) * scale * weight[c] + bias[c]


@compiled(fastmath=SUMS)
def rms_norm(x, weight, epsilon, out):
    """x (C,) -> out (C,)."""
    square = zero
    for c in range(x.size):
        square += x[c] * x[c]
    scale = one / np.sqrt(square / np.float32(x.size) + epsilon)
    for c in range(x.size):
        out[c] = x[c] * scale * weight[c]


@compiled(fastmath=SUMS)
def largest(x):
    """The largest size of x (K,)."""
    most = zero
    for k in range(x.size):
        most = larger(most, abs(x[k]))
    return most


@compiled(fastmath=SUMS)
def settle(x, numbers):
    """x (K,) as it is, or as integers of 16 bits -> numbers (K,); their scale.

    No sum of products with weights, which are 127 at most, leaves 32 bits: if needed the integers are smaller.
    """
    if numbers.itemsize == 4:
        for k in range(x.size):
            numbers[k] = x[k]
        return one
    total = zero
    for k in range(x.size):
        total += abs(x[k])
    scale = max(largest(x) / MOST, total / MOST_OF_ALL)
    inverse = one / scale if scale > zero else zero
    for k in range(x.size):
        numbers[k] = np.int32(np.floor(x[k] * inverse + half))
    return scale


@compiled(fastmath=SUMS)
def shrink(x, pairs):
    """x (K,) becomes what is kept of it: itself, or where numbers lie together in pairs integers of 8 bits; their scale."""
    if pairs == 0:
        return one
    scale = largest(x) / np.float32(127)
    inverse = one / scale if scale > zero else zero
    for k in range(x.size):
        x[k] = np.floor(x[k] * inverse + half)
    return scale


@compiled(fastmath=SUMS)
def softmax(scores):
    """scores (S,) become e^(score - largest); their sum."""
    most = scores[0]
    for s in range(scores.size):
        most = larger(most, scores[s])
    for s in range(scores.size):
        scores[s] = exp(scores[s] - most)
    total = zero
    for s in range(scores.size):
        total += scores[s]
    return total


@compiled(fastmath={"contract"})
def rotate(x, cos, sin):
    """x (D,) with channels i and i + D / 2 turned as a pair by cos and sin (D / 2,)."""
    pairs = cos.size
    for i in range(pairs):
        a, b = x[i], x[pairs + i]
        x[i] = a * cos[i] - b * sin[i]
        x[pairs + i] = b * cos[i] + a * sin[i]


@compiled(fastmath={"contract"})
def times(x, scale, scales):
    """Each of x (K,) times scale and its own of the scales (K,)."""
    for k in range(x.size):
        x[k] *= scale * scales[k]
