"""Two CTAs of a cluster that run a relayed kernel's own Python code, warp by warp in random order.

The device methods are taken as they stand (`rebind`): waits, arrivals, counts, parities, indices
and coordinates are the kernel's. What they call is replaced by a machine with mbarriers, bulk
groups and asynchronous copies that finish late and in any order.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace

from sonicmoe_kernels.cute import gather, schedule
from sonicmoe_kernels.cute.d_hidden import DHiddenTensors
from sonicmoe_kernels.cute.d_hidden_relayed import DHiddenRelayed
from sonicmoe_kernels.cute.grouped_gemm_m import (
    EpilogueMemory,
    Gathered,
    TmaMap,
    Walk,
    WeightMaps,
)
from sonicmoe_kernels.cute.relayed import BLOCKS, PRODUCER_WARPS, SLICE_ROWS, WARPGROUP
from sonicmoe_kernels.tiles import CLUSTER, ELEMENT_BYTES, SLICES, TILE_K, TILE_M, RowGemm

from tests.kernels.symbols import (
    FRAGMENT,
    Accumulators,
    Anything,
    Boxes,
    Cells,
    Coordinates,
    GlobalBoxes,
    Lanes,
    Registers,
    Rows,
    Scores,
    Symbol,
    differentiate,
    h_values,
    rebind,
)
from tests.kernels.warps import Agent, Barrier, Warps

# Methods of a kernel that speak of layouts, registers and products: the machine has its own.
REPLACED = (
    "partition_weight",
    "before_main_loop",
    "multiply",
    "make_chunk",
    "chunk_copies",
    "slice_copies",
    "partition_slices",
    "store_dscore",
)


@dataclass
class Cell:
    values: tuple = ()
    writer: object = None  # who wrote it with ordinary stores that TMA may not see yet
    fenced: bool = False
    readers: set = field(default_factory=set)  # warps whose lanes may still be reading


@dataclass
class State:
    """A place in the ring of stages."""

    stages: int
    index: int
    phase: int

    def clone(self):
        return State(self.stages, self.index, self.phase)

    def advance(self):
        self.index += 1
        if self.index == self.stages:
            self.index, self.phase = 0, self.phase ^ 1


class Machine(Warps):
    """The cluster; `run` plays one interleaving to its end."""

    kernel_class = DHiddenRelayed
    producer_warps = PRODUCER_WARPS
    replaced = REPLACED

    def __init__(self, gemm: RowGemm, counts: list[int], clusters: int, seed: int):
        super().__init__(seed)
        self.gemm = gemm
        self.offsets = [sum(counts[:e]) for e in range(len(counts) + 1)]
        self.clusters = clusters
        self.outputs, self.d_scores = {}, {}
        self.kernel = self.instrument(self.kernel_class)
        self.start = [0]
        for rows in counts:
            units = self.schedule.units_of(rows, TILE_M, gemm.n_tiles, CLUSTER)
            self.start.append(self.start[-1] + units)

    # ------------------------------------------------- the kernel's code, on this machine

    def instrument(self, kernel_class):
        """An object with the kernel's methods, rebound to this machine."""
        fakes = self.fakes()
        methods = {}
        for base in reversed(kernel_class.__mro__[:-1]):
            for name, value in vars(base).items():
                function = getattr(value, "__wrapped__", value)
                if isinstance(function, FunctionType) and not name.startswith("__"):
                    methods[name] = rebind(function, fakes)
        methods.update({name: staticmethod(getattr(self, name)) for name in self.replaced})
        instance = type("Instrumented", (), methods)()
        instance.__dict__.update(kernel_class(self.gemm).__dict__)
        return instance

    def fakes(self):
        plain = {"Int32": int, "const_expr": lambda x: x}
        self.schedule = SimpleNamespace()
        for name in ("units_of", "find_expert", "tile_of"):
            function = rebind(getattr(schedule, name).__wrapped__, plain)
            setattr(self.schedule, name, function)
        arch = SimpleNamespace(
            thread_idx=lambda: (self.agent.first_thread, 0, 0),
            warp_idx=lambda: self.agent.first_thread // 32,
            make_warp_uniform=lambda x: x,
            elect_one=self.elect_one,
            mbarrier_wait=self.wait,
            mbarrier_arrive=self.arrive,
            mbarrier_arrive_and_expect_tx=self.expect,
            cp_async_mbarrier_arrive_noinc=self.arrive_after_copies,
            cp_async_bulk_commit_group=self.commit_group,
            cp_async_bulk_wait_group=self.wait_group,
            fence_proxy=self.fence,
            sync_warp=self.synchronise,
        )
        cute = SimpleNamespace(
            arch=arch,
            copy=self.copy,
            size=len,
            make_rmem_tensor=lambda n, _: (
                Registers([0] * n) if isinstance(n, int) else Accumulators()
            ),
            recast_ptr=lambda pointer, dtype: pointer,
            make_layout=lambda shape: shape,
            domain_offset=lambda start, name: Rows(name, 0, None, start[0]),
        )
        return plain | {
            "cute": cute,
            "cutlass": SimpleNamespace(
                range=lambda *bounds, unroll: range(*bounds), range_constexpr=range, min=min
            ),
            "Float32": float,
            "Int16": int,
            "schedule": self.schedule,
            "pipeline": SimpleNamespace(
                Agent=Anything(),
                CooperativeGroup=lambda _, threads: threads,
                PipelineTmaAsync=SimpleNamespace(create=self.make_ring),
                PipelineUserType=SimpleNamespace(Producer=1, Consumer=0),
                make_pipeline_state=lambda kind, stages: State(stages, 0, kind),
            ),
            "warpgroup": SimpleNamespace(wait_group=self.wait_products),
            "gather": SimpleNamespace(
                rows_per_pass=gather.rows_per_pass,
                load_row_indices=self.load_row_indices,
                gather_rows=self.gather_rows,
            ),
            "expert_rows": Rows,
            "differentiate": differentiate,
        }

    def run(self):
        """Plays all clusters, one after the other: they share nothing but global memory."""
        for cluster in range(self.clusters):
            self.run_cluster(cluster)

    def run_cluster(self, cluster):
        gemm, kernel = self.gemm, self.kernel
        self.events, self.barriers = [], {}
        self.cells = defaultdict(Cell)
        self.stage_a, self.stage_b = defaultdict(dict), defaultdict(dict)
        self.copies = defaultdict(list)  # of cp.async, by agent
        self.agents = []
        ring = kernel.make_pipeline(Anything())
        maps = [WeightMaps(("weights", w), Anything(), ("weights", w), Anything()) for w in (0, 1)]
        epilogue = self.epilogue_tensors()
        for cta in range(CLUSTER):
            for i in range(gemm.epilogue_barriers):
                self.barriers[cta, i] = Barrier(kernel.barrier_arrivals(i))
            walk = Walk(self.offsets, self.start, cta, cluster, self.clusters)
            operand = SimpleNamespace(iterator=0)

            def produce(walk=walk, operand=operand):
                a = Gathered(None, None)
                kernel.produce(ring, walk, a, maps[: gemm.n_sources], operand, None)

            def consume(group, walk=walk):
                memory = EpilogueMemory(Cells("store"), Cells("load"), 0, group, 0, True)
                kernel.consume(ring, walk, Anything(), None, epilogue, memory, None, None)

            def finish(block, walk=walk):
                memory = EpilogueMemory(Cells("store"), Cells("load"), 0, block, 0, True)
                kernel.run_epilogues(walk, None, epilogue, memory)

            for warp in range(self.producer_warps):
                self.agents.append(Agent(cta, f"producer {warp}", 32, 32 * warp, produce))
            for group in range(BLOCKS):
                self.agents.append(
                    Agent(cta, f"consumer {group}", WARPGROUP, 0, lambda g=group, c=consume: c(g))
                )
                if gemm.relayed:
                    self.agents.append(
                        Agent(cta, f"epilogue {group}", 32, 0, lambda g=group, f=finish: f(g))
                    )
        self.play()

    def epilogue_tensors(self):
        """What the kernel is called with beside A and B."""
        return DHiddenTensors(
            TmaMap("load", "H"), TmaMap("store", "dH"), TmaMap("store", "A"), Scores(), None
        )

    # ------------------------------------------------------------------ barriers

    def arrive(self, pointer):
        for cell in self.cells.values():  # what this warpgroup fenced is in order for the waiter
            if cell.writer is self.agent and cell.fenced:
                cell.writer = None
        super().arrive(pointer)

    # ------------------------------------------------------------------ the ring of stages

    def make_ring(self, *, num_stages, producer_group, consumer_group, tx_count, **_):
        for cta in range(CLUSTER):
            for s in range(num_stages):
                self.barriers[cta, ("full", s)] = Barrier(producer_group)
                self.barriers[cta, ("empty", s)] = Barrier(consumer_group)

        def expect_stage(index, _mask):
            self.barrier(("full", index)).add_bytes(tx_count)
            self.barrier(("full", index)).arrive(1)

        return SimpleNamespace(
            sync_object_empty=SimpleNamespace(
                wait=lambda index, phase: self.wait(("empty", index), phase)
            ),
            sync_object_full=SimpleNamespace(arrive=expect_stage),
            producer_get_barrier=lambda state: ("full", state.index),
            consumer_wait=lambda state: self.wait(("full", state.index), state.phase),
            consumer_release=self.release,
        )

    def release(self, state):
        """One arrival of every warp at both CTAs; the stage's products are complete."""
        agent = self.agent
        assert state.index not in agent.running, "released while wgmma reads it"
        if state.index in agent.products:
            seen = agent.products.pop(state.index)
            assert seen == self.stage_of(state.index), "refilled while wgmma read it"
        for cta in range(CLUSTER):
            self.barrier(("empty", state.index), cta).arrive(agent.threads // 32)
        self.pause()

    @staticmethod
    def partition_weight(_maps, _sSource, rank):
        return Anything(), Coordinates(), Anything(), Coordinates()

    def load_row_indices(self, _mIndex, rRows, first_row, end_row, thread, rows):
        rRows[:] = [(first_row, end_row, p * rows) for p in range(len(rRows))]

    def gather_rows(self, _mX, rRows, k, sTile, thread, _length, _rows, first_pass, passes):
        agent, stage = self.agent, sTile // (TILE_M * TILE_K)
        for p in range(first_pass, first_pass + passes):
            self.copies[agent].append((stage, thread // 32, rRows[p], k))

    def arrive_after_copies(self, pointer):
        agent, copies = self.agent, self.copies.pop(self.agent, [])

        def complete():
            for stage, warp, (first, end, row), k in copies:
                self.stage_a[agent.cta, stage][warp, row] = (first, end, k)
            self.barrier(pointer, agent.cta).arrive(agent.threads)

        self.events.append(complete)
        self.pause()

    def stage_of(self, stage):
        """What wgmma of the running warpgroup reads of a stage: its rows, and all weights."""
        agent, half = self.agent, TILE_M // BLOCKS
        group = agent.output.row % TILE_M // half
        rows = {
            key: value
            for key, value in self.stage_a[agent.cta, stage].items()
            if key[1] // half == group
        }
        return rows, dict(self.stage_b[agent.cta, stage])

    def before_main_loop(self, _epilogue, _registers, _memory, output):
        self.agent.output = output

    def multiply(self, _mma, rAcc, _rA, _rB, stage, accumulates, _blocks):
        """Checks that a stage holds one k tile of the warpgroup's tile, whole."""
        agent, gemm = self.agent, self.gemm
        rows, weights = agent.products[stage] = self.stage_of(stage)
        first, length, row, n = agent.output
        per_pass = gather.rows_per_pass(self.producer_warps)
        assert len(rows) == self.producer_warps * (TILE_M // BLOCKS // per_pass)
        ((first_row, end, k),) = set(rows.values())
        assert (first_row, end) == (first + row - row % TILE_M, first + length)
        assert set(weights) == {(w, part) for w in range(gemm.n_sources) for part in range(CLUSTER)}
        ((weight_n, weight_k, expert),) = set(weights.values())
        assert (weight_n, weight_k) == (n, k)
        assert self.offsets[expert] == first and self.offsets[expert + 1] == first + length
        if not accumulates:
            rAcc.products = []
        rAcc.products.append((first + row, n, k))
        assert k == len(rAcc.products) - 1
        agent.running.append(stage)

    def wait_products(self, pending):
        running = self.agent.running
        del running[: max(0, len(running) - pending)]

    # ------------------------------------------------------------------ the epilogue's memory

    @staticmethod
    def make_chunk(_chunk_mma):
        return Registers([None] * FRAGMENT)

    @staticmethod
    def chunk_copies(_chunk_mma, memory):
        return Lanes("put"), memory.sStore, Lanes("get"), memory.sLoad

    @staticmethod
    def slice_copies(_chunk_mma, memory, sBuffers, i):
        part = Cells(sBuffers.space, i)
        return Lanes("put"), part, Lanes("get"), part

    @staticmethod
    def partition_slices(_tma_map, sBuffers, gRows, _inner_tiles):
        return Boxes(sBuffers.space), GlobalBoxes(gRows)

    def store_dscore(self, _tensors, rSum, memory, output):
        if output.n < self.gemm.n_tiles:
            key = output.n, output.first + output.row
            assert key not in self.d_scores
            self.d_scores[key] = tuple(rSum)

    def copy(self, atom, source, target, **options):
        if isinstance(atom, Lanes):
            self.copy_lanes(atom, source, target)
        elif atom == "store":
            self.store(source, target)
        elif atom == "load":
            self.load(source, target, options["tma_bar_ptr"])
        else:
            self.load_weights(atom[1], source, options)
        self.pause()

    def cell(self, key):
        return self.cells[self.agent.cta, key]

    def copy_lanes(self, atom, source, target):
        if atom.direction == "get":
            (key,) = source
            cell = self.cell(key)
            assert cell.values and cell.writer in (None, self.agent), f"{key} is not there yet"
            target[:] = cell.values
            cell.readers.add(self.agent)
            return
        for key in target:
            cell = self.cell(key)
            assert not cell.readers, f"{key} is overwritten while lanes may read it"
            part = key[1] % SLICES
            whole = len(target) > 1
            cell.values = tuple(Symbol((part, *v)) for v in source) if whole else tuple(source)
            cell.writer, cell.fenced = self.agent, False

    def fence(self, _kind, space):
        for cell in self.cells.values():
            if cell.writer is self.agent:
                cell.fenced = True

    def synchronise(self):
        for cell in self.cells.values():
            cell.readers.discard(self.agent)
            if cell.writer is self.agent and cell.fenced:
                cell.writer = None
        self.pause()

    def store(self, source, target):
        """TMA reads the cell later: it must hold then what it holds now."""
        agent, cell = self.agent, self.cell(source)
        assert cell.writer is None, f"{source} is stored before TMA can see it"
        values, (rows, column, half) = cell.values, target
        state = [False]
        agent.open_group.append(state)

        def read():
            assert cell.values == values, f"{source} was overwritten before its store had read it"
            state[0] = True
            for row in range(rows.row, min(rows.row + SLICE_ROWS, rows.length)):
                if column * self.gemm.tile.epi_n < self.gemm.f:
                    key = rows.name, rows.first + row, column, half
                    assert key not in self.outputs, f"{key} is stored twice"
                    self.outputs[key] = values

        self.events.append(read)

    def load(self, source, target, pointer):
        agent, cell = self.agent, self.cell(target)
        assert cell.writer is None and not cell.readers, f"{target} is loaded into while in use"
        rows, column, half = source
        tile = self.gemm.tile

        def land():
            assert ("dH", rows.row, column, half) not in self.outputs, "dH may lie over H"
            cell.values = h_values(rows.row, column, half)
            self.barrier(pointer, agent.cta).add_bytes(-SLICE_ROWS * tile.epi_n * ELEMENT_BYTES)

        self.events.append(land)

    def load_weights(self, weight, source, options):
        agent, (_, index) = self.agent, options["tma_bar_ptr"]
        shared = "mcast_mask" in options
        ctas = range(CLUSTER) if shared else (agent.cta,)
        parts = (agent.cta,) if shared else range(CLUSTER)
        number = self.gemm.n_step * TILE_K * ELEMENT_BYTES * len(parts) // CLUSTER
        for cta in ctas:

            def land(cta=cta):
                for part in parts:
                    self.stage_b[cta, index][weight, part] = source
                self.barrier(("full", index), cta).add_bytes(-number)

            self.events.append(land)
