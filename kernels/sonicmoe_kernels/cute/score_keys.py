"""Scores as integers of the same order, so that ranking needs no comparison of floats.

A key is an int32: a higher score has a higher key, equal scores have equal keys. -0 equals 0, and
every NaN equals every other and ranks above all numbers, as torch.sort has it.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32

MAGNITUDE = 0x7FFFFFFF  # all but the sign
INFINITY_BITS = 0x7F800000
NAN_KEY = 0x7FC00000
LOWEST_KEY = -(2**31)  # below every key
HIGHEST_KEY = 2**31 - 1  # above every key
MINUS_INFINITY_KEY = -0x7F800001  # the key of -inf: ~INFINITY_BITS


@cute.jit
def key_of(bits: Int32) -> Int32:
    """The key of the float32 that has these bits."""
    magnitude = bits & MAGNITUDE
    key = bits
    if bits < 0:
        key = bits ^ MAGNITUDE
    if magnitude == 0:
        key = Int32(0)
    if magnitude > INFINITY_BITS:
        key = Int32(NAN_KEY)
    return key


@cute.jit
def score_of(key: Int32) -> Float32:
    """The score that has this key; 0 for -0."""
    bits = key
    if key < 0:
        bits = key ^ MAGNITUDE
    register = cute.make_rmem_tensor(1, Int32)
    register[0] = bits
    return cute.recast_tensor(register, Float32)[0]
