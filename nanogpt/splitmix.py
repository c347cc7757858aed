"""The SplitMix64 generator on NumPy arrays: random bits as a pure function of seed and counters.

Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
"""

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix64(z: np.ndarray) -> np.ndarray:
    """Return the output function of SplitMix64 for each element, uint64.

    Args:
        z: uint64 array; products wrap at 64 bits (scalars would warn of an overflow).
    """
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_bits(seed: int, *counters: np.ndarray | int) -> np.ndarray:
    """Return 64 random bits for every tuple of counters.

    Each counter in turn selects an output of the generator that the bits so far have seeded.

    Args:
        seed: Seed of the generator.
        counters: Integers from 0, or arrays of them, which are broadcast.

    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.
    """
    bits = np.array([seed], np.uint64)
    for counter in counters:
        index = np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)
        bits = mix64(bits + index * GOLDEN_GAMMA)
    return bits
