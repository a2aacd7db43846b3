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

WARPGROUPS, WARPS = 2, 4  # that multiply, and warps of each


class Slots:
    """The slots of the CTA whose warp looks."""

    iterator = 0

    def __init__(self, machine):
        self.machine = machine

    def __getitem__(self, slot):
        return self.machine.units[self.machine.agent.cta, slot]


class Clusters(Warps):
    """Clusters of two CTAs that share a counter, one launch after the other."""

    def __init__(self, seed, *, pingpong, missing=0, ends=True):
        """missing: readers that `empty` does not count. ends: whether the end is told twice."""
        super().__init__(seed)
        self.counter = SimpleNamespace(iterator=0, value=0)
        self.step = WARPGROUPS if pingpong else 1
        self.readers = CLUSTER * (1 + WARPS * WARPGROUPS // self.step) - missing
        self.ends = ends
        arch = SimpleNamespace(
            mbarrier_init=self.init_barrier,
            mbarrier_wait=self.wait,
            mbarrier_arrive=self.arrive_at,
            mbarrier_arrive_and_expect_tx=self.expect_at,
            store_async_dsmem=self.store,
            inline_ptx=self.increment,
            sync_warp=lambda: None,
            elect_one=self.elect_one,
            make_warp_uniform=int,
        )
        fakes = {
            "cute": SimpleNamespace(arch=arch),
            "cutlass": SimpleNamespace(range_constexpr=range),
            "Int32": int,
        }
        self.init_barriers = rebind(tickets.init_barriers, fakes)
        self.take = rebind(tickets.take.__wrapped__, fakes)
        self.publish = rebind(tickets.publish.__wrapped__, fakes)
        self.draw = rebind(tickets.draw, fakes)

    def launch(self, clusters, total):
        """What every (CTA, role) worked on, in order."""
        self.agents, self.events, self.barriers, self.units = [], [], {}, {}
        self.seen = {}
        drawn = tickets.Tickets(self.counter, Slots(self), 0, tickets.SLOTS)
        for cta in range(CLUSTER * clusters):
            self.agent = SimpleNamespace(cta=cta)
            self.init_barriers(drawn, self.readers)
            work = (drawn, cta // CLUSTER, clusters, total)
            self.add(cta, "producer", partial(self.produce, *work))
            for group in range(WARPGROUPS):
                for warp in range(WARPS):
                    body = partial(self.consume, *work, group if self.step > 1 else 0)
                    self.add(cta, f"consumer {group} {warp}", body)
        self.play()
        return self.seen

    def add(self, cta, name, body):
        self.agents.append(Agent(cta, name, 1, 0, body))

    def produce(self, drawn, cluster, clusters, total):
        """As GroupedGemmM.produce takes its units."""
        agent, turn, unit = self.agent, 0, cluster
        draws = agent.cta % CLUSTER == 0
        seen = self.seen.setdefault((agent.cta, agent.name), [])
        while unit < total:
            number = self.draw(drawn, total, draws)
            seen.append(unit)
            if draws:
                self.publish(drawn, turn + 1, clusters + number)
            turn += 1
            unit = self.take(drawn, turn)
        if self.step > 1 and draws and self.ends:
            self.publish(drawn, turn + 1, total)

    def consume(self, drawn, cluster, _clusters, total, turn):
        """As GroupedGemmM.consume does."""
        agent, unit = self.agent, cluster if turn == 0 else self.take(drawn, turn)
        seen = self.seen.setdefault((agent.cta, agent.name), [])
        while unit < total:
            seen.append(unit)
            turn += self.step
            unit = self.take(drawn, turn)

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

    def increment(self, _ptx, *, read_only_args, predicate, **_):
        if not predicate:
            return None
        drawn, (_place, last) = self.counter.value, read_only_args
        self.counter.value = 0 if drawn >= last else drawn + 1
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
            for group in range(WARPGROUPS):
                own = order[group::WARPGROUPS] if machine.step > 1 else order
                for warp in range(WARPS):
                    assert seen[cta, f"consumer {group} {warp}"] == own
    assert sorted(units) == list(range(total))
    assert machine.counter.value == 0


@pytest.mark.parametrize("pingpong", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_every_unit_is_worked_on_once_launch_after_launch(seed, pingpong):
    draw = random.Random(seed)
    clusters = draw.choice((1, 2, 3))
    machine = Clusters(seed, pingpong=pingpong)
    for _ in range(3):
        check(machine, clusters, draw.choice((0, 1, 2, 3, 5, 8, 17, 29)))


def test_the_machine_notices_a_slot_that_is_given_back_too_soon():
    with pytest.raises(AssertionError):
        for seed in range(20):
            check(Clusters(seed, pingpong=False, missing=1), 2, 29)


def test_the_machine_notices_a_warpgroup_that_never_learns_of_the_end():
    with pytest.raises(AssertionError, match="deadlock"):
        check(Clusters(0, pingpong=True, ends=False), 2, 5)
