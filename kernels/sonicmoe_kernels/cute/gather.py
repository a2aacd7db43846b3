"""Gathers rows of a (T, D) tensor by index into a K-major, 128-byte swizzled shared tile, with
cp.async.

Legend: T tokens, D row length, M tile rows, K tile columns (64 elements of 16 bits: one 128-byte
swizzle row).

Every thread copies chunks of 16 bytes: 8 threads cover one row's 128 bytes, so a warp takes 4 rows
in one pass. With four warps a tile of 128 rows takes 8 passes: thread t always owns the rows
t // 8 + 16 * pass, whose indices it keeps in registers for all k tiles of an output tile.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from sonicmoe_kernels.tiles import TILE_K, TILE_M

CHUNK_BYTES = 16
CHUNK = 8  # elements of 16 bits in a chunk
CHUNKS_PER_ROW = TILE_K // CHUNK


def rows_per_pass(warps: int) -> int:
    """Rows that this many warps copy at once; `warps` is even, so a multiple of the swizzle's 8."""
    return warps * 32 // CHUNKS_PER_ROW


def gather_atom(dtype):
    """16-byte cp.async that bypasses L1."""
    operation = cpasync.CopyG2SOp(cpasync.LoadCacheMode.GLOBAL)
    return cute.make_copy_atom(operation, dtype, num_bits_per_copy=8 * CHUNK_BYTES)


@cute.jit
def load_row_indices(
    mIndex: cute.Tensor, rRows: cute.Tensor, first_row: Int32, end_row: Int32, thread: Int32
):
    """Fills rRows (TILE_M / rows of one pass,) with this thread's source rows.

    Rows past `end_row` repeat the expert's last one: their products are clipped when stored,
    reading garbage indices would not be safe, and a fixed row (0, say) would make one L2 line hot
    for the whole GPU.
    """
    rows = TILE_M // cute.size(rRows)  # of one pass
    for p in cutlass.range_constexpr(cute.size(rRows)):
        row = first_row + p * rows + thread // CHUNKS_PER_ROW
        rRows[p] = mIndex[cutlass.min(row, end_row - 1)]


@cute.jit
def gather_rows(
    atom: cute.CopyAtom,
    mX: cute.Tensor,
    rRows: cute.Tensor,
    k: Int32,
    sTile: cute.Pointer,
    thread: Int32,
    row_length: Constexpr,
    first_pass: Constexpr,
    passes: Constexpr,
):
    """Starts the copies of columns [64 k, 64 k + 64) of indexed rows into `sTile`, in `passes`.

    `sTile` is a pointer without swizzle; the 128-byte swizzle is applied here (chunk ^ row % 8).
    Offsets into mX are 64-bit: T * D may exceed 2^31.
    """
    row = thread // CHUNKS_PER_ROW
    chunk = thread % CHUNKS_PER_ROW
    column = k * TILE_K + chunk * CHUNK
    target = row * TILE_K + (chunk ^ (row % 8)) * CHUNK
    rows = TILE_M // cute.size(rRows)  # of one pass
    for p in cutlass.range_constexpr(first_pass, first_pass + passes):
        source = (mX.iterator + (Int64(rRows[p]) * row_length + column)).align(CHUNK_BYTES)
        destination = (sTile + (target + p * rows * TILE_K)).align(CHUNK_BYTES)
        cute.copy(
            atom,
            cute.make_tensor(source, cute.make_layout(CHUNK)),
            cute.make_tensor(destination, cute.make_layout(CHUNK)),
        )
