"""Gathers rows of a (T, D) tensor by index into a K-major, 128-byte swizzled shared tile, with
cp.async.

Legend: T tokens, D row length, M tile rows, K tile columns (64 elements of 16 bits: one 128-byte
swizzle row).

A warpgroup of 128 threads copies chunks of 16 bytes: 8 threads cover one row's 128 bytes, so 16
rows go in one pass and a tile of 128 rows takes 8 passes. Thread t always owns the rows t // 8 +
16 * pass, whose indices it keeps in registers for all k tiles of an output tile.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64
from cutlass.cute.nvgpu import cpasync

GATHER_THREADS = 128
CHUNK_BYTES = 16
CHUNK = 8  # elements of 16 bits in a chunk
TILE_K = 64
CHUNKS_PER_ROW = TILE_K // CHUNK
ROWS_PER_PASS = GATHER_THREADS // CHUNKS_PER_ROW


def gather_atom(dtype):
    """16-byte cp.async that bypasses L1."""
    operation = cpasync.CopyG2SOp(cpasync.LoadCacheMode.GLOBAL)
    return cute.make_copy_atom(operation, dtype, num_bits_per_copy=8 * CHUNK_BYTES)


@cute.jit
def load_row_indices(
    mIndex: cute.Tensor, rRows: cute.Tensor, first_row: Int32, end_row: Int32, thread: Int32
):
    """Fills rRows (tile_m / 16,) with this thread's source rows.

    Rows past `end_row` repeat the expert's last one: their products are clipped when stored,
    reading garbage indices would not be safe, and a fixed row (0, say) would make one L2 line hot
    for the whole GPU.
    """
    for p in cutlass.range_constexpr(cute.size(rRows)):
        row = first_row + p * ROWS_PER_PASS + thread // CHUNKS_PER_ROW
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
    """Starts the copies of columns [64 k, 64 k + 64) of `passes` * 16 indexed rows into `sTile`.

    `sTile` is a pointer without swizzle; the 128-byte swizzle is applied here (chunk ^ row % 8).
    Offsets into mX are 64-bit: T * D may exceed 2^31.
    """
    row = thread // CHUNKS_PER_ROW
    chunk = thread % CHUNKS_PER_ROW
    column = k * TILE_K + chunk * CHUNK
    target = row * TILE_K + (chunk ^ (row % 8)) * CHUNK
    for p in cutlass.range_constexpr(first_pass, first_pass + passes):
        source = (mX.iterator + (Int64(rRows[p]) * row_length + column)).align(CHUNK_BYTES)
        destination = (sTile + (target + p * ROWS_PER_PASS * TILE_K)).align(CHUNK_BYTES)
        cute.copy(
            atom,
            cute.make_tensor(source, cute.make_layout(CHUNK)),
            cute.make_tensor(destination, cute.make_layout(CHUNK)),
        )
