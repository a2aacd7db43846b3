"""Which tile of a weight gradient a cluster computes next: units over all experts, longest first.

Legend: E experts, M tile along D, N tile along the columns, unit = what one cluster computes at
once: `cluster` M tiles that are neighbours and one N tile, over all rows of one expert. slot = an
expert's place in the order of row counts. wave = one unit for every cluster.

Every expert has the same number of units, but a unit costs as many k tiles as its expert has. So
experts are taken in descending order of rows, and every second wave runs backwards over the
clusters: who got the longest unit of one wave gets the shortest of the next. Nothing is exchanged
between clusters, and the sums of a tile do not depend on who computes it. Busy share of 66
clusters, simulated for 128 experts, D 1536, F 256, dW1 and dW3: balanced counts 97%, Dirichlet(2)
97% (86% in the experts' order), Zipf(0.5) 93% (81%).

Where a few experts have most of the rows, a wave for everybody gives more to clusters that have
more than their part already. Level waves leave those out: a cluster takes part in a wave if it is
ahead of the least loaded by less than the wave's first unit. Every warp of every CTA plays all
waves for all clusters, a few in each lane, and so knows its own units without a word from anybody.
Longest of 66 clusters over their mean, simulated for Zipf(1.2), D 1536, F 256, E 128, in k tiles:
dW2 1.22 instead of 1.67 (one unit is 1.22), dW1 and dW3 1.00 instead of 1.20. With balanced counts
the waves are the same ones, and playing them costs 3 to 6% (H100, 2026-11-27): `uneven` decides.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Uint32

from sonicmoe_kernels.cute.block_scan import bits_below
from sonicmoe_kernels.tiles import WARP

MAX_CTAS = 160  # more than any sm_90 has multiprocessors; one beyond would get no unit
UNUSED = 1 << 30


@cute.jit
def expert_of_turn(start: Int32, thread: Int32, num_experts: Int32) -> Int32:
    """The expert a thread sorts in the turn from `start` on; surplus threads repeat the last."""
    return cutlass.min(start + thread, num_experts - 1)


@cute.jit
def slot_of(expert: Int32, mRows: cute.Tensor, num_experts: Int32) -> Int32:
    """The expert's place when experts are ordered by rows, longest first, then by number."""
    rows = mRows[expert]
    slot = Int32(0)
    for other in cutlass.range(num_experts, unroll=8):
        theirs = mRows[other]
        if theirs > rows or (theirs == rows and other < expert):
            slot += 1
    return slot


@cute.jit
def unit_of(wave: Int32, cluster: Int32, clusters: Int32) -> Int32:
    """The unit that `cluster` takes in `wave`; past the last unit, so are all later ones."""
    place = cluster
    if wave % 2 == 1:
        place = clusters - 1 - cluster
    return wave * clusters + place


@cute.jit
def uneven(
    rows: Int32, all_rows: Int32, num_experts: Int32, units: Constexpr, clusters: Int32
) -> Int32:
    """1 where the longest expert, of so many rows and `units` units, makes level waves pay, else 0.

    It has twice the mean, and a unit of it is more than a sixth of a cluster's part: below, level
    waves are as long (simulated: five kinds of skew, six shapes), and finding them takes time.
    """
    level = Int32(0)
    longest, mean = Float32(rows), Float32(all_rows) / Float32(num_experts)
    part = mean * Float32(num_experts * units) / Float32(clusters)
    if longest > 2.0 * mean and 6.0 * longest > part:
        level = Int32(1)
    return level


def tracked_clusters(cluster: int) -> int:
    """Clusters of `cluster` CTAs that each lane keeps the load of, to know those of all."""
    return -(-MAX_CTAS // (cluster * WARP))


@cute.jit
def start_loads(rLoads: cute.Tensor, lane: Int32, clusters: Int32):
    """No work yet; what stands for no cluster has more than it can get."""
    for j in cutlass.range_constexpr(cute.size(rLoads)):
        rLoads[j] = Int32(0)
        if WARP * j + lane >= clusters:
            rLoads[j] = Int32(UNUSED)


@cute.jit
def join_wave(rLoads: cute.Tensor, rPlaces: cute.Tensor, lane: Int32, cost: Int32, wave: Int32):
    """Writes the places in a wave that the lane's clusters take, -1 for none; returns how many do.

    cost: of the wave's first unit, its longest.
    """
    least = rLoads[0]
    for j in cutlass.range_constexpr(1, cute.size(rLoads)):
        least = cutlass.min(least, rLoads[j])
    least = cute.arch.warp_redux_sync(least, "min")
    joined = Int32(0)
    for j in cutlass.range_constexpr(cute.size(rLoads)):
        joins = Uint32(cute.arch.vote_ballot_sync(rLoads[j] - least < cost))
        before = Int32(cute.arch.popc(joins & bits_below(lane)))
        rPlaces[j] = joined + before
        if rLoads[j] - least >= cost:
            rPlaces[j] = Int32(-1)
        joined += Int32(cute.arch.popc(joins))
    if wave % 2 == 1:
        for j in cutlass.range_constexpr(cute.size(rLoads)):
            if rPlaces[j] >= 0:
                rPlaces[j] = joined - 1 - rPlaces[j]
    return joined


@cute.jit
def next_level_unit(
    rLoads: cute.Tensor, rNext: cute.Tensor, cluster: Int32, units: Int32, cost: Constexpr
) -> Int32:
    """The next unit of `cluster`, `units` or more when there is none.

    All lanes of a warp call it together, as often as the cluster takes units.

    rLoads: see `start_loads`. rNext: the next wave and its first unit, both 0 at first. cost: what
    a unit costs, also of one past the last.
    """
    lane = cute.arch.lane_idx()
    rPlaces = cute.make_rmem_tensor(cute.size(rLoads), Int32)
    unit = Int32(-1)
    while unit < 0:
        wave, base = rNext[0], rNext[1]
        joined = join_wave(rLoads, rPlaces, lane, cost(base), wave)
        mine = Int32(-1)
        for j in cutlass.range_constexpr(cute.size(rLoads)):
            if rPlaces[j] >= 0:
                taken = base + rPlaces[j]
                rLoads[j] += cost(taken)
                if WARP * j + lane == cluster:
                    mine = taken
        rNext[0], rNext[1] = wave + 1, base + joined
        unit = cute.arch.warp_redux_sync(mine, "max")
        if unit < 0 and base + joined >= units:
            unit = units
    return unit


@cute.jit
def place_of(unit: Int32, m_units: Constexpr, n_tiles: Constexpr):
    """(slot, place along D in clusters, N tile) of a unit; units of a slot are consecutive."""
    slot = unit // (m_units * n_tiles)
    inside = unit - slot * (m_units * n_tiles)
    m = inside // n_tiles
    return slot, m, inside - m * n_tiles
