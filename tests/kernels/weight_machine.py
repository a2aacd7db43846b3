"""CTAs whose consumers run a weight gradient kernel's own Python code, in random order.

Their producer is played: a stage says which k tile of which unit it holds. What the consumers call
is the machine of deferred_machine.py.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

from sonicmoe_kernels.cute import schedule_k
from sonicmoe_kernels.cute.deferred_k import DeferredGemmK
from sonicmoe_kernels.cute.grouped_gemm_k import (
    BLOCK,
    BLOCKS,
    CONSUMERS,
    WARPGROUP,
    GroupedGemmK,
    Store,
    Walk,
    blocks_of_last,
)
from sonicmoe_kernels.tiles import TILE_K, WeightGemm

from tests.kernels.deferred_machine import DeferredMachine, Held, Words
from tests.kernels.relayed_machine import Cell, Machine
from tests.kernels.symbols import (
    FRAGMENT,
    Accumulators,
    Anything,
    Boxes,
    Cells,
    Lanes,
    Symbol,
    rebind,
)
from tests.kernels.warps import Agent, Barrier, Warps


class SlabLanes(Lanes):
    """stmatrix of a consumer."""

    def partition_D(self, sOut):
        return sOut


class Sums(Accumulators):
    """A consumer's sums: whose, of which unit, over how many k tiles."""

    def __getitem__(self, i):
        return Symbol(("sum", *self.products[0], len(self.products), i))


class WeightMachine(DeferredMachine):
    """Plays DeferredGemmK or GroupedGemmK without clusters; the units go around `ctas` CTAs."""

    replaced = ("multiply",)

    def __init__(self, gemm: WeightGemm, counts: list[int], ctas: int, seed: int):
        Warps.__init__(self, seed)
        self.gemm, self.ctas = gemm, ctas
        self.offsets = [sum(counts[:e]) for e in range(len(counts) + 1)]
        self.order = sorted(range(len(counts)), key=lambda e: (-counts[e], e))
        self.outputs = {}
        kernel_class = DeferredGemmK if gemm.tile.deferred else GroupedGemmK
        self.kernel = Machine.instrument(self, kernel_class)

    def fakes(self):
        names = {"Int32": int, "const_expr": lambda x: x}
        fakes = Machine.fakes(self) | {"round_pair": lambda low, high, _: (low, high)}
        for name in ("unit_of", "place_of"):
            fakes[name] = rebind(getattr(schedule_k, name).__wrapped__, names)
        fakes["blocks_of_last"] = rebind(blocks_of_last.__wrapped__, names)
        fakes["cutlass"].max = max
        fakes["warp"] = Anything()
        fakes["cpasync"] = SimpleNamespace(
            tma_partition=lambda _atom, _cta, _layout, _s, g: (Boxes("store"), g)
        )
        cute = fakes["cute"]
        cute.arch.barrier = lambda **_: self.synchronise()
        cute.arch.block_idx = lambda: (self.agent.cta, 0, 0)
        cute.arch.grid_dim = lambda: (self.ctas, 1, 1)
        cute.make_rmem_tensor = lambda _, element: (
            Sums() if element is float else Held([None] * FRAGMENT)
        )
        cute.recast_tensor = lambda halves, _: Words(halves)
        cute.make_copy_atom = cute.make_layout = Anything()
        cute.make_tiled_copy_C = lambda *_: SlabLanes("put")
        cute.group_modes = lambda tensor, *_: tensor
        cute.local_tile = lambda name, _, place: (name, *place)
        return fakes

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
            walk = Walk(self.offsets, self.order, len(self.offsets) - 1, units, 0)
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
        """Fills stage after stage with (unit, k tile, rows) in the consumers' order."""
        wave = index = phase = 0
        while (work := self.kernel.work_of(walk, wave)).unit < walk.units:
            for k in range(self.kernel.k_tiles(work.rows)):
                self.wait(("empty", index), phase ^ 1)
                self.stage_b[index] = (work, k)
                self.barrier(("full", index)).arrive(1)
                self.pause()
                index = (index + 1) % self.gemm.tile.stages
                phase ^= index == 0
            wave += 1

    def release(self, state):
        agent = self.agent
        assert state.index not in agent.running, "released while wgmma reads it"
        seen = agent.products.pop(state.index)
        assert seen == self.stage_b[state.index], "refilled while wgmma read it"
        self.barrier(("empty", state.index)).arrive(agent.threads // 32)
        self.pause()

    def multiply(self, _mma, rSum, _g, _s, stage, first, blocks=BLOCKS):
        """Checks that k tiles come in turn, and that no row is left out."""
        agent = self.agent
        work, k = agent.products[stage] = self.stage_b[stage]
        if first:
            rSum.products = []
        assert k == len(rSum.products)
        needed = min(max(work.rows - k * TILE_K, 0), TILE_K)
        assert blocks * BLOCK >= needed, f"{needed} rows, {blocks} blocks"
        rSum.products.append((int(agent.name[-1]), work.unit))
        agent.running.append(stage)

    def delivered(self, values, target):
        yield target, [symbols[0][1:] for symbols in values]
