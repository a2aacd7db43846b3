"""How units are drawn and handed to a cluster's warps, played warp by warp in random order."""

import random
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("cutlass")
from sonicmoe_kernels.cute import tickets
from sonicmoe_kernels.tiles import CLUSTER

from tests.kernels.symbols import rebind
from tests.kernels.warps import Agent, Barrier, Warps

CONSUMER_WARPS = 4  # of each of two warpgroups
READERS = CLUSTER * (1 + CONSUMER_WARPS)


class Counter:
    """The counter in global memory."""

    iterator = 0

    def __init__(self):
        self.value = 0

    def __setitem__(self, _at, value):
        self.value = value


class Slots:
    """The slots of the CTA whose warp looks."""

    iterator = 0

    def __init__(self, machine):
        self.machine = machine

    def __getitem__(self, slot):
        return self.machine.units[self.machine.agent.cta, slot]


class Clusters(Warps):
    """Clusters of two CTAs that share a counter, one launch after the other."""

    def __init__(self, seed, *, readers=READERS, turns_to_end=tickets.TURNS_TO_END):
        super().__init__(seed)
        self.counter = Counter()
        self.readers = readers
        arch = SimpleNamespace(
            mbarrier_init=self.init_barrier,
            mbarrier_wait=self.wait,
            mbarrier_arrive=self.arrive_at,
            mbarrier_arrive_and_expect_tx=self.expect_at,
            store_async_dsmem=self.store,
            atomic_add=self.draw,
            sync_warp=lambda: None,
            elect_one=self.elect_one,
        )
        fakes = {
            "cute": SimpleNamespace(arch=arch),
            "cutlass": SimpleNamespace(range_constexpr=range),
            "Int32": int,
            "TURNS_TO_END": turns_to_end,
        }
        self.init_barriers = rebind(tickets.init_barriers, fakes)
        self.hand_out = rebind(tickets.hand_out.__wrapped__, fakes)
        self.take = rebind(tickets.take.__wrapped__, fakes)

    def launch(self, clusters, total):
        """What every (CTA, role) worked on, in order."""
        self.agents, self.events, self.barriers, self.units = [], [], {}, {}
        self.seen = {}
        slots = tickets.Tickets(Slots(self), 0, tickets.SLOTS)
        for cta in range(CLUSTER * clusters):
            self.agent = SimpleNamespace(cta=cta)
            self.init_barriers(slots, self.readers)
            self.add(cta, "producer", partial(self.work, slots, 0, 1, total))
            for group in range(2):
                for warp in range(CONSUMER_WARPS):
                    name = f"consumer {group} {warp}"
                    self.add(cta, name, partial(self.work, slots, group, 2, total))
        for cluster in range(clusters):
            arguments = (slots, self.counter, cluster, clusters, total)
            self.add(CLUSTER * cluster, "drawer", partial(self.hand_out, *arguments))
        self.play()
        return self.seen

    def add(self, cta, name, body):
        self.agents.append(Agent(cta, name, 1, 0, body))

    def work(self, slots, turn, step, total):
        agent = self.agent
        seen = self.seen.setdefault((agent.cta, agent.name), [])
        unit = self.take(slots, turn)
        while unit < total:
            seen.append(unit)
            turn += step
            unit = self.take(slots, turn)

    def init_barrier(self, pointer, count):
        self.barriers[self.agent.cta, pointer] = Barrier(count)

    def peer(self, pointer, rank):
        return self.barrier(pointer, self.agent.cta // CLUSTER * CLUSTER + rank)

    def arrive_at(self, pointer, rank):
        self.peer(pointer, rank).arrive(1)
        self.pause()

    def expect_at(self, pointer, number, rank):
        barrier = self.peer(pointer, rank)
        barrier.add_bytes(number)
        barrier.arrive(1)
        self.pause()

    def store(self, place, value, pointer, rank):
        barrier, cta = self.peer(pointer, rank), self.agent.cta // CLUSTER * CLUSTER + rank

        def arrive():
            self.units[cta, place] = value
            barrier.add_bytes(-tickets.UNIT_BYTES)

        self.events.append(arrive)
        self.pause()

    def draw(self, _place, number, **_):
        drawn = self.counter.value
        self.counter.value += number
        self.pause()
        return drawn


def check(machine, clusters, total):
    """Every unit once, by all warps of one cluster in the same order; the counter is zero again."""
    seen = machine.launch(clusters, total)
    units = []
    for cluster in range(clusters):
        order = seen[CLUSTER * cluster, "producer"]
        assert order == sorted(order)
        units += order
        for cta in (CLUSTER * cluster, CLUSTER * cluster + 1):
            assert seen[cta, "producer"] == order
            for group in range(2):
                for warp in range(CONSUMER_WARPS):
                    assert seen[cta, f"consumer {group} {warp}"] == order[group::2]
    assert sorted(units) == list(range(total))
    assert machine.counter.value == 0


@pytest.mark.parametrize("seed", range(12))
def test_every_unit_is_worked_on_once_launch_after_launch(seed):
    draw = random.Random(seed)
    clusters = draw.choice((1, 2, 3))
    machine = Clusters(seed)
    for _ in range(3):
        check(machine, clusters, draw.choice((0, 1, 2, 3, 5, 8, 17)))


def test_the_machine_notices_a_slot_that_is_given_back_too_soon():
    with pytest.raises(AssertionError):
        for seed in range(20):
            check(Clusters(seed, readers=READERS - 1), 2, 9)


def test_the_machine_notices_a_warpgroup_that_never_learns_of_the_end():
    with pytest.raises(AssertionError, match="deadlock"):
        check(Clusters(0, turns_to_end=1), 2, 5)
