"""Units handed out as clusters become free, so that clusters that share weights keep step.

Legend: unit: what a cluster computes at once (schedule.py). turn: a unit's place in the order of a
cluster's work. slot: where the units of every SLOTS-th turn lie in shared memory.

The first unit of a cluster is its own number. When its producer begins a turn, one thread of CTA 0
draws the next turn's number from a counter in global memory; later, when the answer is there, it
puts the unit into the slot of both CTAs. Every warp that works on the next turn waits for it
(`full`), reads it and says so (`empty`, of CTA 0). A unit beyond the last ends the work; where two
warpgroups take turns, it is published for the turn behind as well.

A launch leaves the counter as it found it, at zero: every cluster with work draws until it gets a
unit that is not there, so exactly as many numbers are drawn as there are units, and the last one
wraps the counter around. Two launches at once need two counters.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from sonicmoe_kernels.tiles import CLUSTER
from sonicmoe_kernels.tiles import UNIT_SLOTS as SLOTS

UNIT_BYTES = 4


class Tickets(NamedTuple):
    """The counter, a CTA's slots and their barriers."""

    mCounter: cute.Tensor  # (1,)
    sUnits: cute.Tensor  # (SLOTS,)
    full: cute.Pointer  # SLOTS barriers of one arrival: the unit is there
    empty: cute.Pointer  # SLOTS barriers, CTA 0's count: all who need the unit have read it


def make_tickets(mCounter: cute.Tensor, storage) -> Tickets:
    """The tickets in a kernel's shared memory."""
    barriers = storage.unit_barriers.data_ptr()
    sUnits = storage.units.get_tensor(cute.make_layout(SLOTS))
    return Tickets(mCounter, sUnits, barriers, barriers + SLOTS)


def init_barriers(tickets: Tickets, readers: int):
    """By one thread; `readers` warps of the cluster take every turn's unit."""
    for slot in range(SLOTS):
        cute.arch.mbarrier_init(tickets.full + slot, 1)
        cute.arch.mbarrier_init(tickets.empty + slot, readers)


def draw(tickets: Tickets, total: Int32, chosen: Boolean) -> Int32:
    """Draws one of `total` numbers in the `chosen` thread; others get anything.

    Nobody waits for it before it is used. In PTX, an increment that wraps around: what a warp's
    threads add to one address the compiler adds up first, and then waits at once for the answer to
    spread it. Predicated, not branched around: see `publish`.
    """
    return cute.arch.inline_ptx(
        "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], {$r1};",
        write_only_types=[Int32],
        read_only_args=[tickets.mCounter.iterator, total - 1],
        predicate=chosen,
    )


@cute.jit
def publish(tickets: Tickets, turn: Int32, unit: Int32):
    """Puts a turn's unit, which lane 0 has, into its slot of both CTAs; by a warp of CTA 0.

    All its lanes do the same, and `take` says that they know the same: in a loop where a warp may
    part, or about what its lanes may see differently, the compiler does not use uniform registers,
    and every load by TMA moves its operands there by itself.
    """
    use = turn - 1
    slot = use % SLOTS
    unit = cute.arch.make_warp_uniform(unit)
    cute.arch.mbarrier_wait(tickets.empty + slot, (use // SLOTS + 1) % 2)
    with cute.arch.elect_one():
        for rank in cutlass.range_constexpr(CLUSTER):
            cute.arch.mbarrier_arrive_and_expect_tx(tickets.full + slot, UNIT_BYTES, rank)
            slots = tickets.sUnits.iterator
            cute.arch.store_async_dsmem(slots + slot, unit, tickets.full + slot, rank)


@cute.jit
def take(tickets: Tickets, turn: Int32) -> Int32:
    """The unit of a turn after the first; all threads of a warp call it."""
    use = turn - 1
    slot = use % SLOTS
    cute.arch.mbarrier_wait(tickets.full + slot, use // SLOTS % 2)
    unit = tickets.sUnits[slot]
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(tickets.empty + slot, 0)
    return cute.arch.make_warp_uniform(unit)
