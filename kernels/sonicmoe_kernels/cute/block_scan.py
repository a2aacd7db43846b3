"""Scans and reductions over a thread block, and bits exchanged within a warp.

Everything here is called by all threads of a block (or of a warp, where said) together.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Uint32, const_expr

WARP = 32
LARGEST = 2**31 - 1  # of int32; the neutral element of "min"


@cute.jit
def combine(a: Int32, b: Int32, operation: Constexpr) -> Int32:
    """The sum or the minimum of two values."""
    result = a + b
    if const_expr(operation == "min"):
        result = cutlass.min(a, b)
    return result


@cute.jit
def block_scan(value: Int32, sScratch: cute.Tensor, threads: Constexpr, operation: Constexpr):
    """(what all threads before this one combine to, what all threads combine to).

    operation: "add" or "min". sScratch: threads / 32 int32; it may be used again at once.
    """
    neutral = LARGEST if const_expr(operation == "min") else 0
    lane = cute.arch.lane_idx()
    warp = cute.arch.warp_idx()
    inclusive = value
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(inclusive, 1 << step)
        if lane >= (1 << step):
            inclusive = combine(inclusive, below, operation)
    before = cute.arch.shuffle_sync_up(inclusive, 1)
    if lane == 0:
        before = Int32(neutral)
    if lane == WARP - 1:
        sScratch[warp] = inclusive
    cute.arch.sync_threads()
    total = Int32(neutral)
    for other in cutlass.range_constexpr(threads // WARP):
        theirs = sScratch[other]
        if other < warp:
            before = combine(before, theirs, operation)
        total = combine(total, theirs, operation)
    cute.arch.sync_threads()
    return before, total


@cute.jit
def swap_bits(row: Uint32, other: Uint32, upper: cutlass.Boolean, step: Constexpr) -> Uint32:
    """One step of the transposition: exchanges the off-diagonal blocks of side `step`.

    other: the row `step` away. upper: this is the row of the higher number.
    """
    low = sum(1 << bit for bit in range(WARP) if not bit & step)  # columns of the left block
    result = (row & Uint32(low)) | ((other & Uint32(low)) << Uint32(step))
    if upper:
        result = (row & Uint32(~low & 0xFFFFFFFF)) | ((other >> Uint32(step)) & Uint32(low))
    return result


@cute.jit
def transpose_bits(row: Uint32) -> Uint32:
    """Transposes the 32 x 32 bits of a warp: bit i of lane j becomes bit j of lane i."""
    lane = cute.arch.lane_idx()
    for step in (16, 8, 4, 2, 1):
        other = cute.arch.shuffle_sync_bfly(row, step)
        row = swap_bits(row, other, (lane & step) != 0, step)
    return row


@cute.jit
def lowest_bit(word: Uint32) -> Int32:
    """The place of the lowest set bit of a word that is not 0."""
    return Int32(cute.arch.popc((word & (Uint32(0) - word)) - Uint32(1)))


@cute.jit
def bits_below(lane: Int32) -> Uint32:
    """A word with the bits of all lanes below `lane`."""
    return (Uint32(1) << Uint32(lane)) - Uint32(1)
