"""The machine of relayed_machine.py for kernels with the deferred schedule.

A consumer warpgroup is one agent; it reads and writes all four slices of a chunk at once, and TMA
moves whole chunks.
"""

from __future__ import annotations

from types import SimpleNamespace

from sonicmoe_kernels.cute.d_hidden import DHidden
from sonicmoe_kernels.cute.d_hidden_deferred import DHiddenDeferred
from sonicmoe_kernels.cute.grouped_gemm_m import OutputTile, TmaMap
from sonicmoe_kernels.cute.up import UpStores
from sonicmoe_kernels.cute.up_deferred import UpDeferred
from sonicmoe_kernels.tiles import ELEMENT_BYTES, SLICES, TILE_M, WARPGROUP_ROWS

from tests.kernels.relayed_machine import REPLACED, SLICE_ROWS, Machine
from tests.kernels.symbols import (
    FRAGMENT,
    Boxes,
    GlobalBoxes,
    Lanes,
    Registers,
    Symbol,
    activate,
    h_values,
    rebind,
)

KEPT = ("before_main_loop", "slice_copies", "partition_slices")  # the kernel's own, or not there


class Held(Registers):
    """A chunk of sums in 16 bits; nothing before the first tile."""

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


def block_values(row, column, half):
    """What a fragment of H holds for the four slices of a block at once."""
    slices = [h_values(row + SLICE_ROWS * part, column, half) for part in range(SLICES)]
    return tuple(Symbol(("slices", *values)) for values in zip(*slices, strict=True))


class DeferredMachine(Machine):
    """Plays DHiddenDeferred, or UpDeferred."""

    producer_warps = 4
    replaced = (*(name for name in REPLACED if name not in KEPT), "partition_output")

    def __init__(self, gemm, counts, clusters, seed):
        self.kernel_class = UpDeferred if gemm.kernel == "up" else DHiddenDeferred
        super().__init__(gemm, counts, clusters, seed)

    def instrument(self, kernel_class):
        instance = super().instrument(kernel_class)
        located = instance.locate

        def locate(walk, unit, expert):
            found = expert, first, length, at = located(walk, unit, expert)
            name = self.agent.name
            if name.startswith("consumer"):
                row = at.m * TILE_M + int(name[-1]) * WARPGROUP_ROWS
                self.agent.output = OutputTile(first, length, row, at.n)
            return found

        instance.locate = locate
        gemm, tile = self.gemm, self.gemm.tile  # what make_layouts counts
        instance.stores_per_group = tile.epi_sets * gemm.stores
        instance.loads_per_group = tile.load_sets * gemm.loads
        return instance

    def fakes(self):
        fakes = super().fakes()
        fakes["cute"].arch.barrier = lambda **_: self.synchronise()
        fakes["cute"].recast_tensor = lambda halves, _: Words(halves)
        fakes["round_pair"] = lambda low, high, _: (low, high)
        fakes["activate"] = activate
        loads = rebind(DHidden.before_main_loop.__wrapped__, fakes)
        return fakes | {"DHidden": SimpleNamespace(before_main_loop=loads)}

    def epilogue_tensors(self):
        if self.gemm.kernel == "up":
            return UpStores(TmaMap("store", "H"), TmaMap("store", "A"))
        return super().epilogue_tensors()

    @staticmethod
    def make_chunk(_chunk_mma):
        return Held([None] * FRAGMENT)

    @staticmethod
    def partition_output(_tma_map, sBuffers, gRows, _inner_tiles):
        return Boxes(sBuffers.space), GlobalBoxes(gRows)

    # ------------------------------------------------------------------ whole chunks

    def cells_of(self, chunk):
        space, number = chunk
        return [self.cell((space, number * SLICES + part)) for part in range(SLICES)]

    def copy_lanes(self, atom: Lanes, source, target):
        if atom.direction == "put":
            super().copy_lanes(atom, source, target)
            return
        cells = [self.cell(key) for key in source]
        for cell in cells:
            assert cell.values and cell.writer in (None, self.agent), f"{source} is not there yet"
            cell.readers.add(self.agent)
        columns = zip(*(cell.values for cell in cells), strict=True)
        target[:] = [Symbol(("slices", *values)) for values in columns]

    def store(self, source, target):
        """A store is read later: its cells must hold then what they hold now."""
        cells = self.cells_of(source)
        for cell in cells:
            assert cell.writer is None, f"{source} is stored before TMA can see it"
        values = [cell.values for cell in cells]
        state = [False]
        self.agent.open_group.append(state)

        def read():
            now = [cell.values for cell in cells]
            assert now == values, f"{source} was overwritten before its store had read it"
            state[0] = True
            for key, value in self.delivered(values, target):
                assert key not in self.outputs, f"{key} is stored twice"
                self.outputs[key] = value

        self.events.append(read)

    def delivered(self, values, target):
        """The outputs that a store of cells with these values writes."""
        rows, column, half = target
        for row in range(rows.row, min(rows.row + WARPGROUP_ROWS, rows.length)):
            if column * self.gemm.tile.epi_n < self.gemm.f:
                key = rows.name, rows.first + row, column, half
                yield key, values[(row - rows.row) // SLICE_ROWS]

    def load(self, source, target, pointer):
        agent, cells = self.agent, self.cells_of(target)
        rows, column, half = source
        for cell in cells:
            assert cell.writer is None, f"{target} is loaded into while in use"
            assert not cell.readers, f"{target} is loaded into while lanes may read it"

        def land():
            assert ("dH", rows.row, column, half) not in self.outputs, "dH may lie over H"
            for part, cell in enumerate(cells):
                cell.values = h_values(rows.row + SLICE_ROWS * part, column, half)
            number = WARPGROUP_ROWS * self.gemm.tile.epi_n * ELEMENT_BYTES
            self.barrier(pointer, agent.cta).add_bytes(-number)

        self.events.append(land)
