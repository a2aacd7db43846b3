"""Which tile a CTA computes next: a flat list of units over all experts, walked by persistent
clusters.

Legend: E experts, M tile rows of one expert, N tile columns, unit = what one cluster computes at
once, rank = a CTA's place in its cluster.

An expert with `rows` rows has m_tiles = ceil(rows / tile_m) and n_tiles columns of tiles. In a
cluster of two, two consecutive m tiles of one expert share every weight tile (it is multicast):
one unit is (m pair, n). An odd last m tile is not padded to a pair: its unit is (m, n pair), two
different weight tiles without multicast. With an odd n_tiles the very last CTA gets n == n_tiles:
TMA reads zeros there and stores nothing.

Units of one expert are consecutive, pairs of rows outermost, n innermost, so the rows of A stay in
L2 while the cluster next to it takes the next n. Where units are drawn (tickets.py), rows are
innermost instead: whatever shares a weight tile starts at about the same time. An expert of many
rows would then bring all of them again for every few columns: a group of its row tiles at a time
has all columns before the next group.

All functions here are index arithmetic without warp intrinsics (they also run on the CPU), except
`load_schedule`, which is a block-wide scan.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from sonicmoe_kernels.tiles import COARSE_STEP, FINE_STEP

WARP = 32


class Tile(NamedTuple):
    """A CTA's m and n tile of an expert; shared_weights is 1 if the cluster shares the weights."""

    m: Int32
    n: Int32
    shared_weights: Int32


@cute.jit
def units_of(rows: Int32, tile_m: Constexpr, n_tiles: Constexpr, cluster: Constexpr) -> Int32:
    """Number of units an expert of `rows` rows has."""
    m_tiles = (rows + (tile_m - 1)) // tile_m
    units = m_tiles * n_tiles
    if const_expr(cluster == 2):
        units = (m_tiles // 2) * n_tiles + (m_tiles % 2) * ((n_tiles + 1) // 2)
    return units


@cute.jit
def find_expert(unit: Int32, expert: Int32, mStart: cute.Tensor, num_experts: Constexpr) -> Int32:
    """The expert that owns `unit`: the last e >= `expert` with start[e] <= unit < start[E].

    `expert` is a lower bound (a CTA's units only grow). Bisection: log2(E) reads even when most
    experts are empty; empty ones are skipped because their start equals the next one's.
    """
    low = expert
    high = Int32(num_experts)
    while high - low > 1:
        middle = (low + high) // 2
        if mStart[middle] <= unit:
            low = middle
        else:
            high = middle
    return low


@cute.jit
def tile_of(
    unit: Int32,
    rows: Int32,
    rank: Int32,
    tile_m: Constexpr,
    n_tiles: Constexpr,
    cluster: Constexpr,
) -> Tile:
    """The tile of CTA `rank` of the cluster in `unit`, counted from its expert's first unit."""
    m = unit // n_tiles
    n = unit - m * n_tiles
    shared = Int32(0)
    if const_expr(cluster == 2):
        m_tiles = (rows + (tile_m - 1)) // tile_m
        paired_units = (m_tiles // 2) * n_tiles
        m = 2 * m + rank
        shared = Int32(1)
        if unit >= paired_units:
            m = m_tiles - 1
            n = 2 * (unit - paired_units) + rank
            shared = Int32(0)
    return Tile(m, n, shared)


@cute.jit
def tile_of_drawn(
    unit: Int32,
    rows: Int32,
    rank: Int32,
    tile_m: Constexpr,
    n_tiles: Constexpr,
    row_group: Constexpr,
) -> Tile:
    """The same with rows innermost, for clusters of two: the units of two columns of tiles follow
    each other, pairs of rows first, of `row_group` row tiles (0: of all).
    """
    m_tiles = (rows + (tile_m - 1)) // tile_m
    pairs, odd, first = m_tiles // 2, m_tiles % 2, Int32(0)
    if const_expr(row_group):
        most = row_group // 2
        first = unit // (most * n_tiles) * most
        unit -= first * n_tiles
        pairs -= first
        if pairs >= most:  # an odd tile is of the group behind
            pairs, odd = Int32(most), Int32(0)
    group = 2 * pairs + odd
    step = unit // group
    unit -= step * group
    columns = Int32(2)
    if step == n_tiles // 2:  # the last one of an odd number
        columns = Int32(1)
    pair = unit // columns
    m = 2 * (first + pair) + rank
    n = 2 * step + unit - pair * columns
    shared = Int32(1)
    if pair >= pairs:
        m = m_tiles - 1
        n = 2 * step + rank
        shared = Int32(0)
    return Tile(m, n, shared)


class TurnedTile(NamedTuple):
    """Rows [row, end) of an expert, the `width` of their product, a CTA's n tile, and 1 if the
    cluster shares the weights.
    """

    row: Int32
    end: Int32
    width: Int32
    n: Int32
    shared_weights: Int32


@cute.jit
def turned_width(rows: Int32, tile_rows: Constexpr) -> Int32:
    """Width of all tiles of an expert where rows lie along N of the product.

    It has as few as it needs of up to tile_rows, the last one filled by less than the others.
    """
    tiles = (rows + (tile_rows - 1)) // tile_rows
    width = (rows + tiles - 1) // tiles
    if width > tile_rows // 2:
        width = (width + (FINE_STEP - 1)) // FINE_STEP * FINE_STEP
    else:
        width = (width + (COARSE_STEP - 1)) // COARSE_STEP * COARSE_STEP
    return width


@cute.jit
def turned_tile(
    unit: Int32,
    rows: Int32,
    rank: Int32,
    tile_rows: Constexpr,
    n_pairs: Constexpr,
    row_group: Constexpr,
) -> TurnedTile:
    """The tile of CTA `rank` in `unit` of clusters that share rows: its CTAs have two n.

    Rows are innermost, of `row_group` row tiles (0: of all): units that have the same weights
    follow each other.
    """
    tiles = (rows + (tile_rows - 1)) // tile_rows
    width = turned_width(rows, tile_rows)
    first = Int32(0)
    if const_expr(row_group):
        first = unit // (row_group * n_pairs) * row_group
        unit -= first * n_pairs
        tiles = cutlass.min(tiles - first, row_group)
    pair = unit // tiles
    row = (first + unit - pair * tiles) * width
    return TurnedTile(row, cutlass.min(row + width, rows), width, 2 * pair + rank, Int32(0))


@cute.jit
def load_schedule(
    mOffsets: cute.Tensor,
    sOffsets: cute.Tensor | None,
    sStart: cute.Tensor,
    sWarpSum: cute.Tensor,
    num_experts: Constexpr,
    threads: Constexpr,
    tile_m: Constexpr,
    n_tiles: Constexpr,
    cluster: Constexpr,
):
    """Fills sOffsets (E+1), if there is one, and sStart (E+1), the first unit of every expert; all
    `threads` threads call it. Returns where the offsets are to be read.

    Thread t owns ceil(E / threads) consecutive experts: O(E / threads) work and one scan over
    warps. Ends with the tables written but not yet visible: the caller synchronises the block
    before reading them. sWarpSum holds threads / 32 entries of scratch.
    """
    thread = cute.arch.thread_idx()[0]
    lane = cute.arch.lane_idx()
    warp = cute.arch.warp_idx()
    offsets = mOffsets
    if const_expr(sOffsets is not None):
        for i in cutlass.range(thread, num_experts + 1, threads):
            sOffsets[i] = mOffsets[i]
        cute.arch.sync_threads()
        offsets = sOffsets
    per_thread = (num_experts + threads - 1) // threads
    first = thread * per_thread
    total = Int32(0)
    for j in cutlass.range_constexpr(per_thread):
        e = first + j
        if e < num_experts:
            total += units_of(offsets[e + 1] - offsets[e], tile_m, n_tiles, cluster)
    inclusive = total
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(inclusive, 1 << step)
        if lane >= (1 << step):
            inclusive += below
    if lane == WARP - 1:
        sWarpSum[warp] = inclusive
    cute.arch.sync_threads()
    start = inclusive - total
    for w in cutlass.range_constexpr(threads // WARP):
        if w < warp:
            start += sWarpSum[w]
    for j in cutlass.range_constexpr(per_thread):
        e = first + j
        if e < num_experts:
            sStart[e] = start
            start += units_of(offsets[e + 1] - offsets[e], tile_m, n_tiles, cluster)
            if e == num_experts - 1:
                sStart[num_experts] = start
    return offsets
