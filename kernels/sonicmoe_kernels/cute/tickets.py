"""Units handed out as clusters become free, so that clusters that share weights keep step.

Legend: unit: what a cluster computes at once (schedule.py). turn: a unit's place in the order of a
cluster's work. slot: where the units of every SLOTS-th turn lie in shared memory.

One thread of a cluster draws a unit for each turn from a counter in global memory and puts it into
the turn's slot of both CTAs. Everybody who works on that turn waits for it (`full`), reads it and
says so (`empty`, of CTA 0). Turn i is drawn when turn i - SLOTS has begun. The first unit of a
cluster is its own number, without drawing; a unit beyond the last ends the work, and stands in the
slots of two turns, because warpgroups take turns.

A launch leaves the counter as it found it, at zero: every cluster with work draws until it gets a
unit that is not there, so exactly as many numbers are drawn as there are units. Two launches at
once need two counters.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from sonicmoe_kernels.tiles import CLUSTER
from sonicmoe_kernels.tiles import UNIT_SLOTS as SLOTS

UNIT_BYTES = 4
TURNS_TO_END = 2


class Tickets(NamedTuple):
    """A CTA's slots, and their barriers."""

    sUnits: cute.Tensor  # (SLOTS,)
    full: cute.Pointer  # SLOTS barriers of one arrival: the unit is there
    empty: cute.Pointer  # SLOTS barriers, CTA 0's count: all who need the unit have read it


def make_tickets(storage) -> Tickets:
    """The tickets in a kernel's shared memory."""
    barriers = storage.unit_barriers.data_ptr()
    sUnits = storage.units.get_tensor(cute.make_layout(SLOTS))
    return Tickets(sUnits, barriers, barriers + SLOTS)


def init_barriers(tickets: Tickets, readers: int):
    """By one thread; `readers` warps of the cluster read every unit."""
    for slot in range(SLOTS):
        cute.arch.mbarrier_init(tickets.full + slot, 1)
        cute.arch.mbarrier_init(tickets.empty + slot, readers)


@cute.jit
def hand_out(
    tickets: Tickets, mCounter: cute.Tensor, cluster: Int32, clusters: Int32, total: Int32
):
    """Draws and publishes the units of all turns; by one thread of CTA 0."""
    unit, turn, to_end = cluster, Int32(0), Int32(TURNS_TO_END)
    while to_end > 0:
        slot = turn % SLOTS
        cute.arch.mbarrier_wait(tickets.empty + slot, (turn // SLOTS + 1) % 2)
        if turn > 0 and unit < total:
            drawn = cute.arch.atomic_add(mCounter.iterator, Int32(1), sem="relaxed", scope="gpu")
            if drawn == total - 1:
                mCounter[0] = Int32(0)
            unit = clusters + drawn
        for rank in cutlass.range_constexpr(CLUSTER):
            cute.arch.mbarrier_arrive_and_expect_tx(tickets.full + slot, UNIT_BYTES, rank)
            cute.arch.store_async_dsmem(
                tickets.sUnits.iterator + slot, unit, tickets.full + slot, rank
            )
        if unit >= total:
            to_end -= 1
        turn += 1


@cute.jit
def take(tickets: Tickets, turn: Int32) -> Int32:
    """The unit of a turn; all threads of a warp call it."""
    slot = turn % SLOTS
    cute.arch.mbarrier_wait(tickets.full + slot, turn // SLOTS % 2)
    unit = tickets.sUnits[slot]
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(tickets.empty + slot, 0)
    return unit
