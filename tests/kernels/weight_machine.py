"""CTAs whose consumers run the weight gradients' own Python code, in random order.

Their producer is played: a stage says which k tile of which unit it holds. A consumer warpgroup is
one agent, which writes a slab whole; TMA reads it later. The rest is relayed_machine.py's.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

from sonicmoe_kernels.cute import schedule_k
from sonicmoe_kernels.cute.grouped_gemm_k import (
    CONSUMERS,
    WARPGROUP,
    GroupedGemmK,
    Store,
    Walk,
)
from sonicmoe_kernels.tiles import SLICES, WeightGemm

from tests.kernels.relayed_machine import Cell, Machine
from tests.kernels.symbols import (
    FRAGMENT,
    Accumulators,
    Anything,
    Boxes,
    Cells,
    Lanes,
    Registers,
    Symbol,
    rebind,
)
from tests.kernels.warps import Agent, Barrier, Warps


class SlabLanes(Lanes):
    """stmatrix of a consumer."""

    def partition_D(self, sOut):
        return sOut


class Held(Registers):
    """A slab of sums in 16 bits; nothing before the first unit."""

    def fill(self, value):
        self[:] = [Symbol(("nothing",))] * len(self)


class Words:
    """The same, two values a word."""

    def __init__(self, halves):
        self.halves = halves

    def __len__(self):
        return len(self.halves) // 2

    def __setitem__(self, i, pair):
        self.halves[2 * i : 2 * i + 2] = pair


class Sums(Accumulators):
    """A consumer's sums: whose, of which unit, over how many k tiles and blocks of 16 rows."""

    blocks = 0

    def __getitem__(self, i):
        return Symbol(("sum", *self.products[0], len(self.products), self.blocks, i))


class WeightMachine(Machine):
    """Plays GroupedGemmK without clusters; the units go around `ctas` CTAs."""

    replaced = ("multiply",)

    def __init__(self, gemm: WeightGemm, counts: list[int], ctas: int, seed: int):
        Warps.__init__(self, seed)
        self.gemm, self.ctas = gemm, ctas
        self.offsets = [sum(counts[:e]) for e in range(len(counts) + 1)]
        self.order = sorted(range(len(counts)), key=lambda e: (-counts[e], e))
        self.outputs = {}
        self.kernel = self.instrument(GroupedGemmK)

    def fakes(self):
        names = {"Int32": int, "const_expr": lambda x: x}
        fakes = super().fakes() | {"round_pair": lambda low, high, _: (low, high)}
        for name in ("unit_of", "place_of"):
            fakes[name] = rebind(getattr(schedule_k, name).__wrapped__, names)
        fakes["start_loads"] = fakes["next_level_unit"] = Anything()  # test_level_schedule.py
        fakes["cutlass"].max = max
        fakes["warp"] = Anything()
        fakes["cpasync"] = SimpleNamespace(
            tma_partition=lambda _atom, _cta, _layout, _s, g: (Boxes("store"), g)
        )
        cute = fakes["cute"]
        cute.arch.barrier = lambda **_: self.synchronise()
        cute.arch.block_idx = lambda: (self.agent.cta, 0, 0)
        cute.arch.grid_dim = lambda: (self.ctas, 1, 1)
        cute.arch.lane_idx = lambda: 0
        cute.arch.warp_redux_sync = lambda value, _: value
        cute.make_rmem_tensor = self.make_registers
        cute.recast_tensor = lambda halves, _: Words(halves)
        cute.make_copy_atom = cute.make_layout = Anything()
        cute.make_tiled_copy_C = lambda *_: SlabLanes("put")
        cute.group_modes = lambda tensor, *_: tensor
        cute.local_tile = lambda name, _, place: (name, *place)
        return fakes

    @staticmethod
    def make_registers(_shape, element):
        if element is int:
            return Registers([0] * 2)
        return Sums() if element is float else Held([None] * FRAGMENT)

    def run(self):
        kernel, gemm = self.kernel, self.gemm
        for cta in range(self.ctas):
            self.events, self.barriers, self.agents = [], {}, []
            self.cells, self.stage_b = defaultdict(Cell), {}
            for stage in range(gemm.tile.stages):
                self.barriers[cta, ("full", stage)] = Barrier(1)
                self.barriers[cta, ("empty", stage)] = Barrier(CONSUMERS * WARPGROUP // 32)
            ring = SimpleNamespace(
                consumer_wait=lambda state: self.wait(("full", state.index), state.phase),
                consumer_release=self.release,
            )
            units = (len(self.offsets) - 1) * gemm.m_units * gemm.n_tiles
            walk = Walk(self.offsets, self.order, len(self.offsets) - 1, units, rank=0, level=0)
            stores = tuple(Store("store", name) for name in range(gemm.halves))

            def consume(group, walk=walk, ring=ring, stores=stores):
                any_ = Anything()
                kernel.consume(ring, walk, any_, any_, stores, any_, any_, Cells("store"), group)

            self.agents.append(Agent(cta, "producer", 1, 0, lambda w=walk: self.produce(w)))
            for group in range(CONSUMERS):
                self.agents.append(
                    Agent(cta, f"consumer {group}", WARPGROUP, 0, lambda g=group, c=consume: c(g))
                )
            self.play()

    def produce(self, walk):
        """Fills stage after stage with (unit, k tile) in the consumers' order."""
        index = phase = 0
        waves = self.kernel.before_first_wave()
        while (work := self.kernel.next_work(walk, *waves)).unit < walk.units:
            for k in range(self.kernel.k_tiles(work.rows)):
                self.wait(("empty", index), phase ^ 1)
                self.stage_b[index] = (work.unit, k)
                self.barrier(("full", index)).arrive(1)
                self.pause()
                index = (index + 1) % self.gemm.tile.stages
                phase ^= index == 0

    def release(self, state):
        agent = self.agent
        assert state.index not in agent.running, "released while wgmma reads it"
        seen = agent.products.pop(state.index)
        assert seen == self.stage_b[state.index], "refilled while wgmma read it"
        self.barrier(("empty", state.index)).arrive(agent.threads // 32)
        self.pause()

    def multiply(self, _mma, rSum, _g, _s, stage, accumulates, blocks):
        """Checks that k tiles come in turn."""
        agent = self.agent
        unit, k = agent.products[stage] = self.stage_b[stage]
        if not accumulates:
            rSum.products, rSum.blocks = [], 0
        assert k == len(rSum.products)
        rSum.blocks += blocks
        rSum.products.append((int(agent.name[-1]), unit))
        agent.running.append(stage)

    def store(self, source, target):
        """A store is read later: its buffer must hold then what it holds now."""
        space, buffer = source
        cells = [self.cell((space, buffer * SLICES + part)) for part in range(SLICES)]
        for cell in cells:
            assert cell.writer is None, f"{source} is stored before TMA can see it"
        values = [cell.values for cell in cells]
        state = [False]
        self.agent.open_group.append(state)

        def read():
            now = [cell.values for cell in cells]
            assert now == values, f"{source} was overwritten before its store had read it"
            state[0] = True
            assert target not in self.outputs, f"{target} is stored twice"
            self.outputs[target] = [symbols[0][1:] for symbols in values]

        self.events.append(read)
