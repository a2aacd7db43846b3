"""Gathers rows of a (T, D) tensor into an M-major shared tile: rows run along K.

Legend: T tokens, D row length, M tile columns of a row (64 or 128), K tile rows (64),
chunk = 8 elements of 16 bits, 16 bytes.

The tile is what wgmma reads as an M-major operand with 128-byte swizzle: slabs of 64 columns, each
of 64 rows of 128 bytes, in which chunk c of row k sits at place c ^ (k % 8). A warpgroup fills it
with cp.async: M / 8 threads for one row, 1024 / M rows in a pass. The rows of one thread are
congruent modulo 8, so all its targets are one register plus constants.

Each lane keeps the index of one row of the tile and its warp hands them out by shuffles: loads of
indices then run a whole tile ahead of the copies that need them, at the price of one register.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, Int64, const_expr

from sonicmoe_kernels.tiles import TILE_K

GATHER_THREADS = 128
WARPS = GATHER_THREADS // 32
CHUNK = 8
CHUNK_BYTES = 16
SLAB = 64  # columns of a slab: 128 bytes
SWIZZLE_ROWS = 8
NO_ROW = -1


@cute.jit
def chunk_target(row: Int32, chunk: Int32) -> Int32:
    """Element offset of chunk `chunk` of row `row` in the tile: the swizzled address map."""
    slab = chunk // (SLAB // CHUNK)
    place = (chunk % (SLAB // CHUNK)) ^ (row % SWIZZLE_ROWS)
    return slab * (SLAB * TILE_K) + row * SLAB + place * CHUNK


@cute.jit
def row_of_lane(lane: Int32, warp: Int32, tile_m: Constexpr) -> Int32:
    """The tile row whose index `lane` of `warp` keeps; lanes past the 16 rows repeat them."""
    rows_per_pass = GATHER_THREADS * CHUNK // tile_m
    warp_rows = rows_per_pass // WARPS
    kept = lane % (TILE_K // WARPS)
    return kept // warp_rows * rows_per_pass + warp * warp_rows + kept % warp_rows


@cute.jit
def load_row_index(mIndex: cute.Tensor, first: Int32, row: Int32, end: Int32) -> Int32:
    """mIndex[first + row], or NO_ROW where row >= end, the expert's row count: not read there."""
    index = Int32(NO_ROW)
    if row < end:
        index = mIndex[first + row]
    return index


@cute.jit
def gather_tile_k(
    mX: cute.Tensor,
    index: Int32,
    column: Int32,
    sTile: cute.Pointer,
    thread: Int32,
    tile_m: Constexpr,
    row_length: Constexpr,
):
    """Starts the copies of columns [column, column + tile_m) of 64 rows into the tile at `sTile`.

    index: what `load_row_index` gave this lane for row `row_of_lane`. Rows without index and
    columns past `row_length` become zeros. sTile: without swizzle. Offsets into mX have 64 bits.
    """
    chunks_per_row = tile_m // CHUNK
    rows_per_pass = GATHER_THREADS // chunks_per_row
    warp_rows = rows_per_pass // WARPS
    chunk = thread % chunks_per_row
    first_row = thread // chunks_per_row
    row_in_warp = first_row % warp_rows
    target = chunk_target(first_row, chunk)
    inside = column + chunk * CHUNK < row_length
    for p in cutlass.range_constexpr(TILE_K // rows_per_pass):
        row = cute.arch.shuffle_sync(index, p * warp_rows + row_in_warp)
        valid = row >= 0
        if const_expr(row_length % tile_m != 0):
            valid = valid and inside
        offset = cute.assume(Int64(row) * row_length + column + chunk * CHUNK, divby=CHUNK)
        copy_or_zero(mX.iterator + offset, sTile + (target + p * rows_per_pass * SLAB), valid)


@cute.jit
def copy_or_zero(source: cute.Pointer, target: cute.Pointer, valid: Boolean):
    """Starts one 16-byte cp.async past L1; where not `valid`, writes zeros and reads nothing."""
    size = Int32(CHUNK_BYTES) if valid else Int32(0)
    cute.arch.inline_ptx(
        f"cp.async.cg.shared.global [{{$r0}}], [{{$r1}}], {CHUNK_BYTES}, {{$r2}};",
        read_only_args=[target, source, size],
    )
