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

from sonicmoe_kernels.tiles import TILE_K

CHUNK_BYTES = 16
CHUNK = 8  # elements of 16 bits in a chunk
CHUNKS_PER_ROW = TILE_K // CHUNK


def rows_per_pass(warps: int) -> int:
    """Rows that this many warps copy at once; `warps` is even, so a multiple of the swizzle's 8."""
    return warps * 32 // CHUNKS_PER_ROW


@cute.jit
def load_row_indices(
    mIndex: cute.Tensor,
    rRows: cute.Tensor,
    first_row: Int32,
    end_row: Int32,
    thread: Int32,
    rows: Constexpr,
):
    """Fills rRows with this thread's source rows, one of the `rows` of every pass.

    Rows past `end_row` repeat the expert's last one: their products are clipped when stored,
    reading garbage indices would not be safe, and a fixed row (0, say) would make one L2 line hot
    for the whole GPU.
    """
    for p in cutlass.range_constexpr(cute.size(rRows)):
        row = first_row + p * rows + thread // CHUNKS_PER_ROW
        rRows[p] = mIndex[cutlass.min(row, end_row - 1)]


@cute.jit
def gather_rows(
    mX: cute.Tensor,
    rRows: cute.Tensor,
    k: Int32,
    sTile: cute.Pointer,
    thread: Int32,
    row_length: Constexpr,
    rows: Constexpr,
    first_pass: Constexpr,
    passes: Constexpr,
):
    """Starts the copies of columns [64 k, 64 k + 64) of indexed rows into `sTile`.

    In `passes` of `rows`, from `first_pass` on.

    `sTile` is a pointer without swizzle; the 128-byte swizzle is applied here (chunk ^ row % 8).
    Offsets into mX are 64-bit: T * D may exceed 2^31. In PTX: an address that is known to be a
    multiple of 16 bytes only by its terms is rounded to one by `cute.copy`, twice a chunk.
    """
    row = thread // CHUNKS_PER_ROW
    chunk = thread % CHUNKS_PER_ROW
    column = k * TILE_K + chunk * CHUNK
    target = row * TILE_K + (chunk ^ (row % 8)) * CHUNK
    for p in cutlass.range_constexpr(first_pass, first_pass + passes):
        source = cute.assume(Int64(rRows[p]) * row_length + column, divby=CHUNK)
        destination = cute.assume(target + p * rows * TILE_K, divby=CHUNK)
        cute.arch.inline_ptx(
            f"cp.async.cg.shared.global [{{$r0}}], [{{$r1}}], {CHUNK_BYTES};",
            read_only_args=[sTile + destination, mX.iterator + source],
        )
