"""The template of the four GEMMs with ragged M on sm_90a: C[r] = epilogue(A[r] B[expert of r]).

Legend: R rows of all experts, E experts, M tile rows (128), N tile columns, K depth of a stage
(64), S stages. m = global, g = tile, s = shared, r = register (CuTe's grammar).

A kernel is a subclass that says what A, B and the epilogue are: `up`, `down`, `d_hidden`,
`d_input`. The schedule is in schedule.py and, where units are drawn, in tickets.py;
gathered A is in gather.py, clipping in tma_ragged.py.

Warp roles, 384 threads a CTA, one CTA a multiprocessor, clusters of two:
- warpgroup 0 produces: TMA for B (multicast when the cluster shares it) and for A, or cp.async by
  all its 128 threads for gathered A; both land on the same mbarrier.
- warpgroups 1 and 2 consume: wgmma with fp32 accumulators, then the epilogue. Cooperative: 64 rows
  of every tile each. Ping-pong: every second tile each, one's epilogue under the other's main
  loop. Relayed: relayed.py. Turned, with A's rows along N: turned.py.

Shared memory: per stage (128 + N) * 128 bytes; store and load buffers of the epilogue; two tables
of E + 1 numbers (relayed with many experts: one). Every CTA of a cluster has the same number of k
tiles per unit, so stages stay in step.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Boolean, Float32, Int16, Int32, Int64, const_expr, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp
from cutlass.tensor_utils import LayoutEnum

from sonicmoe_kernels.cute import gather, schedule, tickets
from sonicmoe_kernels.cute.main_loop import WARPGROUP, MainLoop
from sonicmoe_kernels.tiles import (
    CLUSTER,
    ELEMENT_BYTES,
    THREADS,
    TILE_K,
    TILE_M,
    WARPGROUP_ROWS,
    RowGemm,
)

PRODUCER_REGISTERS = {"gathered": 56, "tma": 40}  # with 168 at launch, three roles share 504
CONSUMER_REGISTERS = {"gathered": 224, "tma": 232}
FIRST_EPILOGUE_BARRIER = 1  # named barriers 1 and 2, one for each consumer warpgroup
FIRST_ORDER_BARRIER = 3  # 3 and 4: whose turn the main loop is (ping-pong)
DRAWN_BY = 2  # k tiles of TMA: the number drawn at their turn's start has come
MULTICAST_MASK = (1 << CLUSTER) - 1


class WeightMaps(NamedTuple):
    """TMA maps of one weight: for tiles the cluster shares, and for a CTA's own."""

    shared_atom: cute.CopyAtom
    mShared: cute.Tensor
    own_atom: cute.CopyAtom
    mOwn: cute.Tensor


class TmaMap(NamedTuple):
    """A TMA atom and the coordinate tensor that goes with it."""

    atom: cute.CopyAtom
    mTensor: cute.Tensor


class Gathered(NamedTuple):
    """Rows mIndex[r] of mX are the rows of A."""

    mX: cute.Tensor
    mIndex: cute.Tensor


class Loads(NamedTuple):
    """What a producer loads from and to."""

    a: TmaMap | Gathered
    sA: cute.Tensor
    weights: tuple  # maps of each weight
    sources: list  # of each weight, partitioned
    rank: Int32


class Walk(NamedTuple):
    """The schedule's tables, and which CTA of which cluster walks over the units."""

    offsets: cute.Tensor  # (E + 1,) first row of every expert
    sStart: cute.Tensor  # (E + 1,) first unit of every expert
    rank: Int32
    cluster: Int32
    clusters: Int32
    drawn: tickets.Tickets | None = None  # where units are handed out


class OutputTile(NamedTuple):
    """Where a warpgroup's block of 64 rows lies: rows of its expert, and its n tile."""

    first: Int32  # first row of the expert among R
    length: Int32  # rows of the expert
    row: Int32  # first row of the block, counted from `first`
    n: Int32


class EpilogueMemory(NamedTuple):
    """A consumer thread's view of the epilogue's shared memory."""

    sStore: cute.Tensor  # (64, epi_n, 2 warpgroups * epi_sets * stores)
    sLoad: cute.Tensor  # (64, epi_n, 2 warpgroups * load_sets * loads)
    barriers: cute.Pointer  # 2 warpgroups * load_sets; relayed: load_sets, then to hand over
    group: Int32  # consumer warpgroup, 0 or 1
    thread: Int32  # in the warpgroup
    is_issuer: Boolean  # true in the one warp that talks to TMA


class GroupedGemmM(MainLoop):
    """Base of the ragged-M kernels; see the module's text for warp roles and shared memory."""

    def __init__(self, gemm: RowGemm, *, weights_are_n_major: cutlass.Constexpr):
        self.gemm = gemm
        self.tile = gemm.tile
        self.dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[gemm.dtype]
        self.pingpong = gemm.pingpong
        self.gathers = gemm.gathers
        self.row_blocks = 2 if self.pingpong else 1  # blocks of 64 rows a warpgroup owns
        self.k_tiles = gemm.k_tiles
        self.shared_by = CLUSTER  # CTAs, one tile of weights
        self.chunk = (WARPGROUP_ROWS, gemm.tile.epi_n)  # rows and columns of one store
        self.b_major = OperandMajorMode.MN if weights_are_n_major else OperandMajorMode.K
        self.b_layout = LayoutEnum.COL_MAJOR if weights_are_n_major else LayoutEnum.ROW_MAJOR
        kind = "gathered" if gemm.gathers else "tma"
        self.producer_warps = WARPGROUP // 32 if gemm.gathers else 1
        self.consumer_warps = 4 if self.pingpong else 8  # that take part in a tile
        self.producer_registers = PRODUCER_REGISTERS[kind]
        self.consumer_registers = CONSUMER_REGISTERS[kind]

    # ------------------------------------------------------------------ host

    def make_layouts(self):
        """The tiled MMA, shared layouts and what holds them."""
        tile, gemm, dtype = self.tile, self.gemm, self.dtype
        k_major = LayoutEnum.ROW_MAJOR
        mma_rows = 1 if self.pingpong else 2
        self.tiled_mma = sm90.make_trivial_tiled_mma(
            dtype,
            dtype,
            OperandMajorMode.K,
            self.b_major,
            Float32,
            (mma_rows, 1, 1),
            (64, tile.tile_n),
        )
        # Fragments of one chunk of the epilogue: as the accumulators of a 64 x epi_n product.
        self.chunk_mma = sm90.make_trivial_tiled_mma(
            dtype,
            dtype,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (64, tile.epi_n),
        )
        self.make_operand_layouts()
        self.stores_per_group = tile.epi_sets * gemm.stores
        self.loads_per_group = tile.load_sets * gemm.loads
        self.store_layout = sm90.make_smem_layout_epi(
            dtype, k_major, self.chunk, gemm.store_buffers
        )
        self.load_layout = sm90.make_smem_layout_epi(
            dtype, k_major, self.chunk, max(gemm.load_buffers, 1)
        )

        @cute.struct
        class Storage:
            stage_barriers: cute.struct.MemRange[Int64, 2 * tile.stages]
            epilogue_barriers: cute.struct.MemRange[Int64, max(gemm.epilogue_barriers, 2)]
            offsets: cute.struct.MemRange[Int32, (gemm.num_experts + 1) * gemm.offsets_in_shared]
            start: cute.struct.MemRange[Int32, gemm.num_experts + 1]
            warp_sums: cute.struct.MemRange[Int32, THREADS // 32]
            unit_barriers: cute.struct.MemRange[Int64, 2 * tickets.SLOTS * tile.dynamic]
            units: cute.struct.MemRange[Int32, tickets.SLOTS * tile.dynamic]
            a: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(self.a_layout)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(self.b_smem_layout)], 1024]
            stores: cute.struct.Align[
                cute.struct.MemRange[dtype, cute.cosize(self.store_layout)], 1024
            ]
            loads: cute.struct.Align[
                cute.struct.MemRange[dtype, cute.cosize(self.load_layout) * bool(gemm.loads)], 1024
            ]

        self.Storage = Storage

    def make_operand_layouts(self):
        """Shared layouts of A and B. A half of a stacked B tile is a stage of its own."""
        tile, gemm, dtype = self.tile, self.gemm, self.dtype
        shape = (TILE_M, tile.tile_n, TILE_K)
        source_shape = (TILE_M, gemm.n_step, TILE_K)
        self.a_layout = sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, shape, dtype, tile.stages)
        self.b_smem_layout = sm90.make_smem_layout_b(self.b_layout, shape, dtype, tile.stages)
        self.source_layout = sm90.make_smem_layout_b(
            self.b_layout, source_shape, dtype, gemm.n_sources * tile.stages
        )

    def weight_maps(self, mW: cute.Tensor) -> WeightMaps:
        """TMA maps of mW (E, rows, columns), seen as (N, K, E)."""
        view = self.weight_view(mW)
        one_stage = cute.slice_(self.source_layout, (None, None, 0))
        box = (self.gemm.n_step, TILE_K)
        shared = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SMulticastOp(), view, one_stage, box, num_multicast=CLUSTER
        )
        own = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), view, one_stage, box)
        return WeightMaps(*shared, *own)

    def weight_view(self, mW: cute.Tensor) -> cute.Tensor:
        """mW (E, rows, columns) as (N, K, E)."""
        experts, rows, columns = mW.shape
        experts = Int32(experts)  # all static, the extent E * D * F would have to fit 32 bits
        expert_stride = rows * columns
        if const_expr(self.b_major == OperandMajorMode.K):
            shape, stride = (rows, columns, experts), (columns, 1, expert_stride)
        else:
            shape, stride = (columns, rows, experts), (1, columns, expert_stride)
        return cute.make_tensor(mW.iterator, cute.make_layout(shape, stride=stride))

    def contiguous_a(self, mA: cute.Tensor) -> TmaMap:
        """TMA map of A (R_max, K). Rows past an expert's end are clipped when C is stored."""
        one_stage = cute.slice_(self.a_layout, (None, None, 0))
        operation = cpasync.CopyBulkTensorTileG2SOp()
        return TmaMap(*cpasync.make_tiled_tma_atom(operation, mA, one_stage, (TILE_M, TILE_K)))

    def store_map(self, view: cute.Tensor) -> TmaMap:
        """Map for storing chunks."""
        chunk = cute.slice_(self.store_layout, (None, None, 0))
        operation = cpasync.CopyBulkTensorTileS2GOp()
        return TmaMap(*cpasync.make_tiled_tma_atom(operation, view, chunk, self.chunk))

    def load_map(self, view: cute.Tensor) -> TmaMap:
        """Map for loading chunks."""
        chunk = cute.slice_(self.load_layout, (None, None, 0))
        operation = cpasync.CopyBulkTensorTileG2SOp()
        return TmaMap(*cpasync.make_tiled_tma_atom(operation, view, chunk, self.chunk))

    def launch(self, mOffsets, a, weights, epilogue, num_ctas, stream, mCounter=None):
        """Launches num_ctas (even) persistent CTAs. mCounter: (1,), zero; where units are drawn."""
        self.kernel(
            mOffsets,
            a,
            weights,
            epilogue,
            mCounter,
            self.tiled_mma,
            self.chunk_mma,
            self.a_layout,
            self.b_smem_layout,
            self.source_layout,
            self.store_layout,
            self.load_layout,
        ).launch(
            grid=[num_ctas, 1, 1],
            block=[THREADS, 1, 1],
            cluster=[CLUSTER, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    # ------------------------------------------------------- device: kernel

    @cute.kernel
    def kernel(
        self,
        mOffsets: cute.Tensor,
        a: tuple,
        weights: tuple,
        epilogue: tuple,
        mCounter: cute.Tensor | None,
        tiled_mma: cute.TiledMma,
        chunk_mma: cute.TiledMma,
        a_layout: cute.ComposedLayout,
        b_layout: cute.ComposedLayout,
        source_layout: cute.ComposedLayout,
        store_layout: cute.ComposedLayout,
        load_layout: cute.ComposedLayout,
    ):
        gemm = self.gemm
        thread = cute.arch.thread_idx()[0]
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        storage = cutlass.memory.SmemAllocator().allocate(self.Storage)

        stages = self.make_pipeline(storage)
        barriers = storage.epilogue_barriers.data_ptr()
        drawn = None
        if const_expr(self.tile.dynamic):
            drawn = tickets.make_tickets(mCounter, storage)
        if warp_index == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(gemm.epilogue_barriers):
                    cute.arch.mbarrier_init(barriers + i, self.barrier_arrivals(i))
                if const_expr(self.tile.dynamic):
                    warps = self.producer_warps + self.consumer_warps
                    tickets.init_barriers(drawn, CLUSTER * warps)
        cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive_relaxed()
        table = cute.make_layout(gemm.num_experts + 1)
        sOffsets = None
        if const_expr(gemm.offsets_in_shared):
            sOffsets = storage.offsets.get_tensor(table)
        sStart = storage.start.get_tensor(table)
        sWarpSums = storage.warp_sums.get_tensor(cute.make_layout(THREADS // 32))
        offsets = schedule.load_schedule(
            mOffsets,
            sOffsets,
            sStart,
            sWarpSums,
            gemm.num_experts,
            THREADS,
            gemm.tile_rows,
            gemm.n_tiles,
            self.shared_by,
        )
        cute.arch.cluster_wait()
        cute.arch.sync_threads()

        sA = storage.a.get_tensor(a_layout.outer, swizzle=a_layout.inner)
        sB = storage.b.get_tensor(b_layout.outer, swizzle=b_layout.inner)
        sSource = storage.b.get_tensor(source_layout.outer, swizzle=source_layout.inner)
        cluster = cute.arch.block_idx()[0] // CLUSTER
        clusters = cute.arch.grid_dim()[0] // CLUSTER
        walk = Walk(offsets, sStart, rank, cluster, clusters, drawn)

        if group == 0:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if const_expr(not gemm.relayed):
                if const_expr(gemm.gathers) or warp_index == 0:
                    self.produce(stages, walk, a, weights, sA, sSource)
            else:
                if warp_index < self.producer_warps:
                    self.produce(stages, walk, a, weights, sA, sSource)
                else:
                    buffers = self.epilogue_buffers(storage, store_layout, load_layout)
                    block = warp_index - self.producer_warps
                    lane = cute.arch.lane_idx()
                    memory = EpilogueMemory(*buffers, barriers, block, lane, Boolean(True))
                    self.run_epilogues(walk, chunk_mma, epilogue, memory)
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            buffers = self.epilogue_buffers(storage, store_layout, load_layout)
            memory = EpilogueMemory(
                *buffers, barriers, group - 1, thread % WARPGROUP, warp_index % 4 == 0
            )
            self.consume(stages, walk, tiled_mma, chunk_mma, epilogue, memory, sA, sB)
        # A CTA's shared memory must outlive its partner's multicasts and releases.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    def epilogue_buffers(self, storage, store_layout, load_layout) -> tuple:
        """The tensors of the store and of the load buffers."""
        sStore = storage.stores.get_tensor(store_layout.outer, swizzle=store_layout.inner)
        if const_expr(not self.gemm.loads):
            return sStore, sStore  # unused
        sLoad = storage.loads.get_tensor(load_layout.outer, swizzle=load_layout.inner)
        return sStore, sLoad

    def barrier_arrivals(self, barrier: int) -> int:
        """Arrivals that complete one of the epilogue's barriers."""
        return 1

    def make_pipeline(self, storage) -> pipeline.PipelineTmaAsync:
        """Full: one arrival with the bytes, 128 of cp.async. Empty: both CTAs' consumers."""
        gathers = self.gemm.gathers
        threads = pipeline.Agent.Thread
        producers = 1 + 32 * self.producer_warps if gathers else 1
        gemm = self.gemm
        rows_by_tma = gemm.n_sources * gemm.n_step + (0 if gathers else gemm.tile_rows)
        return pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.stage_barriers.data_ptr(),
            num_stages=self.tile.stages,
            producer_group=pipeline.CooperativeGroup(threads, producers),
            consumer_group=pipeline.CooperativeGroup(threads, self.consumer_warps * CLUSTER),
            tx_count=rows_by_tma * TILE_K * ELEMENT_BYTES,
            cta_layout_vmnk=cute.make_layout((1, CLUSTER, 1, 1)),
            defer_sync=True,
        )

    def unit_of(self, walk: Walk, turn: Int32, unit: Int32) -> Int32:
        """The unit of a turn after the first: `unit`, unless they are drawn."""
        return tickets.take(walk.drawn, turn) if self.tile.dynamic else unit

    def draw(self, walk, total, thread) -> Int32:
        """Draws a number, in one thread of the cluster."""
        return tickets.draw(walk.drawn, total, walk.rank * THREADS + thread == 0)

    @cute.jit
    def hand_out(self, walk, turn, unit, warp):
        """Hands out the unit of a turn, in the warp that drew it."""
        if walk.rank == 0 and warp == 0:
            tickets.publish(walk.drawn, turn, unit)

    @cute.jit
    def hand_out_late(self, walk, turn, unit, warp, k):
        """The same, in the k tile by which the number has come."""
        if k == min(DRAWN_BY, self.gemm.k // TILE_K - 1):
            self.hand_out(walk, turn, unit, warp)

    @cute.jit
    def locate(self, walk, unit: Int32, expert: Int32):
        """(expert, its first row, its rows, this CTA's tile) of a unit not before `expert`'s."""
        expert = schedule.find_expert(unit, expert, walk.sStart, self.gemm.num_experts)
        first = walk.offsets[expert]
        length = walk.offsets[expert + 1] - first
        return expert, first, length, self.tile_at(unit - walk.sStart[expert], length, walk.rank)

    def tile_at(self, unit: Int32, rows: Int32, rank: Int32) -> schedule.Tile:
        """A CTA's tile of a unit, counted from its expert's first."""
        gemm, group = self.gemm, self.tile.row_group
        if const_expr(self.tile.dynamic):
            return schedule.tile_of_drawn(unit, rows, rank, gemm.tile_rows, gemm.n_tiles, group)
        return schedule.tile_of(unit, rows, rank, gemm.tile_rows, gemm.n_tiles, CLUSTER)

    # ----------------------------------------------------- device: producer

    @cute.jit
    def produce(self, stages, walk, a, weights, sA, sSource):
        """Fills the stages of all tiles of this CTA, in the order in which they are consumed."""
        gemm = self.gemm
        thread = cute.arch.thread_idx()[0]
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.tile.stages)
        sources = [self.partition_weight(maps, sSource, walk.rank) for maps in weights]
        loads = Loads(a, sA, weights, sources, walk.rank)
        if const_expr(gemm.gathers):
            rows_per_pass = gather.rows_per_pass(self.producer_warps)
            rRows = cute.make_rmem_tensor(gemm.tile_rows // rows_per_pass, Int32)
            sA_linear = cute.recast_ptr(sA.iterator, dtype=self.dtype)  # without the swizzle
        expert, turn = Int32(0), Int32(0)
        unit = walk.cluster
        total = walk.sStart[gemm.num_experts]
        while unit < total:
            if const_expr(self.tile.dynamic):
                number = self.draw(walk, total, thread)
            expert, first, length, at = self.locate(walk, unit, expert)
            if const_expr(gemm.gathers):
                row, end = self.rows_of(first, length, at)
                gather.load_row_indices(a.mIndex, rRows, row, end, thread, rows_per_pass)
                if const_expr(self.tile.dynamic):  # the number has come when the indices have
                    self.hand_out(walk, turn + 1, walk.clusters + number, warp_index)
            for k_source in cutlass.range_constexpr(gemm.k_sources):
                for k in cutlass.range(gemm.k // TILE_K, unroll=1):
                    if const_expr(self.tile.dynamic and not gemm.gathers and k_source == 0):
                        self.hand_out_late(walk, turn + 1, walk.clusters + number, warp_index, k)
                    stages.sync_object_empty.wait(state.index, state.phase)
                    if warp_index == 0:
                        self.load_by_tma(stages, state, loads, k_source, k, expert, first, at)
                    if const_expr(gemm.gathers):
                        sTile = sA_linear + state.index * (gemm.tile_rows * TILE_K)
                        self.gather_stage(a.mX, rRows, k, sTile, thread, end - row, at)
                        cute.arch.cp_async_mbarrier_arrive_noinc(stages.producer_get_barrier(state))
                    state.advance()
            turn += 1
            unit = self.unit_of(walk, turn, unit + walk.clusters)
        if const_expr(self.tile.dynamic and self.pingpong):
            # the warpgroup that would take a turn behind the last learns that there is none
            self.hand_out(walk, turn + 1, total, warp_index)

    def rows_of(self, first: Int32, length: Int32, at) -> tuple:
        """A tile's first row, and the end of what it may gather."""
        return first + at.m * TILE_M, first + length

    @cute.jit
    def gather_stage(self, mX, rRows, k, sTile, thread, rows: Int32, at):
        """Starts the copies of a stage's rows; of at most 64, only the first 64."""
        length, at_once = self.gemm.k, gather.rows_per_pass(self.producer_warps)
        half = TILE_M // 2 // at_once  # passes of 64 rows
        for passes in cutlass.range_constexpr(2):
            if passes == 0 or rows > TILE_M // 2:
                gather.gather_rows(
                    mX, rRows, k, sTile, thread, length, at_once, passes * half, half
                )

    @cute.jit
    def load_by_tma(self, stages, state, loads, source: cutlass.Constexpr, k, expert, first, at):
        """Starts what TMA loads of a stage: k tile `k` of `source`, of what is stacked on it, A."""
        gemm = self.gemm
        stages.sync_object_full.arrive(state.index, None)  # expects the bytes
        barrier = stages.producer_get_barrier(state)
        for n_source in cutlass.range_constexpr(gemm.n_sources):
            shared_s, shared_g, own_s, own_g = loads.sources[source + n_source]
            maps = loads.weights[source + n_source]
            slot = state.index * gemm.n_sources + n_source
            if at.shared_weights == 1:
                cute.copy(
                    maps.shared_atom,
                    shared_g[None, at.n, k, expert],
                    shared_s[None, slot],
                    tma_bar_ptr=barrier,
                    mcast_mask=Int16(MULTICAST_MASK),
                )
            else:
                cute.copy(
                    maps.own_atom,
                    own_g[None, at.n, k, expert],
                    own_s[None, slot],
                    tma_bar_ptr=barrier,
                )
        if const_expr(not gemm.gathers):
            depth = source * (gemm.k // TILE_K) + k
            self.load_a(loads.a, loads.sA, first + at.m * TILE_M, depth, state.index, barrier)

    def partition_weight(self, maps: WeightMaps, sSource: cute.Tensor, rank: Int32) -> tuple:
        """(shared, global) of the multicast map, then of a CTA's own; global is (box, N, K, E)."""
        box = (self.gemm.n_step, TILE_K)
        sBox = cute.group_modes(sSource, 0, 2)
        gShared = cute.group_modes(cute.local_tile(maps.mShared, box, (None, None, None)), 0, 2)
        gOwn = cute.group_modes(cute.local_tile(maps.mOwn, box, (None, None, None)), 0, 2)
        pair = cute.make_layout(CLUSTER)
        return (
            *cpasync.tma_partition(maps.shared_atom, rank, pair, sBox, gShared),
            *cpasync.tma_partition(maps.own_atom, 0, cute.make_layout(1), sBox, gOwn),
        )

    @cute.jit
    def load_a(self, a, sA, row, k, stage, barrier):
        """Loads A's tile from row `row` and k tile `k` on."""
        rows = cute.domain_offset((row, 0), a.mTensor)
        sBox, gBox = self.partition_boxes(a, sA, rows, (0, None), (TILE_M, TILE_K))
        cute.copy(a.atom, gBox[None, k], sBox[None, stage], tma_bar_ptr=barrier)

    # ----------------------------------------------------- device: consumers

    @cute.jit
    def consume(self, stages, walk, tiled_mma, chunk_mma, epilogue, memory, sA, sB):
        """Multiplies and runs the epilogue of all tiles of this warpgroup."""
        gemm = self.gemm
        operands = self.tile_operands(tiled_mma, chunk_mma, memory, sA, sB)
        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.tile.stages)
        expert, turn = Int32(0), Int32(0)
        unit = walk.cluster
        turns, step = 1, walk.clusters
        total = walk.sStart[gemm.num_experts]
        if const_expr(self.pingpong):
            turns, step = 2, 2 * walk.clusters  # the groups take turns
            if memory.group == 1:
                turn += 1
                unit = self.unit_of(walk, turn, unit + walk.clusters)
                for _ in cutlass.range(self.k_tiles, unroll=1):
                    read.advance()
                # Group 0 goes first.
                cute.arch.barrier_arrive(
                    barrier_id=FIRST_ORDER_BARRIER, number_of_threads=2 * WARPGROUP
                )
        release = read.clone()
        tiles_done = Int32(0)
        while unit < total:
            expert, first, length, at = self.locate(walk, unit, expert)
            output = self.output_tile(first, length, at, memory)
            if output.row < output.length:
                read, release = self.compute_tile(
                    stages, read, release, operands, epilogue, memory, output, tiles_done
                )
                tiles_done += 1
            elif const_expr(not self.pingpong):
                # No row of this block of 64 belongs to the expert: let the stages pass by.
                for _k in cutlass.range(self.k_tiles, unroll=1):
                    stages.consumer_wait(read)
                    stages.consumer_release(release)
                    release.advance()
                    read.advance()
            turn += turns
            unit = self.unit_of(walk, turn, unit + step)
            if const_expr(self.pingpong):
                for _k in cutlass.range(self.k_tiles, unroll=1):
                    read.advance()
                    release.advance()
        if memory.is_issuer:
            cute.arch.cp_async_bulk_wait_group(0, read=False)

    def tile_operands(self, tiled_mma, chunk_mma, memory, sA, sB) -> tuple:
        """What `compute_tile` needs of a thread, tile after tile.

        Operands of the main loop, registers of the epilogue, fragments of its chunks.
        """
        mma_slice = 0 if const_expr(self.pingpong) else memory.group * WARPGROUP
        operands = self.make_operands(tiled_mma, mma_slice, (TILE_M, self.tile.tile_n), sA, sB)
        return operands, self.epilogue_registers(), chunk_mma

    def output_tile(self, first: Int32, length: Int32, at, memory) -> OutputTile:
        """Where this warpgroup's part of a tile lies."""
        row = at.m * TILE_M
        if const_expr(not self.pingpong):
            row += memory.group * WARPGROUP_ROWS
        return OutputTile(first, length, row, at.n)

    @cute.jit
    def compute_tile(self, stages, read, release, operands, epilogue, memory, output, tiles_done):
        """Main loop and epilogue of a tile; (read, release) behind it."""
        operands, registers, chunk_mma = operands
        self.before_main_loop(epilogue, registers, memory, output)
        read, release = self.main_loop(stages, read, release, operands, memory)
        rAcc = operands[1]
        self.run_epilogue(epilogue, registers, memory, chunk_mma, rAcc, output, tiles_done)
        return read, release

    @cute.jit
    def main_loop(self, stages, read, release, operands: tuple, memory):
        """All k tiles of a tile; (read, release) behind it."""
        if const_expr(self.pingpong):
            # In-order main loops: a group that waits too far ahead sees parity alias.
            cute.arch.barrier(
                barrier_id=FIRST_ORDER_BARRIER + memory.group, number_of_threads=2 * WARPGROUP
            )
        read = self.start_stage(stages, read, operands, False)
        read, release = self.multiply_stages(
            stages, read, release, operands, Int32(1), Int32(self.k_tiles)
        )
        if const_expr(self.pingpong):  # the other warpgroup's turn
            cute.arch.barrier_arrive(
                barrier_id=FIRST_ORDER_BARRIER + 1 - memory.group,
                number_of_threads=2 * WARPGROUP,
            )
        release = self.finish_stage(stages, release, 0)
        return read, release

    # ----------------------------------- device: what an epilogue is made of

    def epilogue_registers(self) -> tuple:
        """Registers that a kernel's epilogue carries; none by default."""
        return ()

    @cute.jit
    def before_main_loop(self, epilogue, registers, memory, output):
        """What an epilogue wants started before a tile's main loop; nothing by default."""

    @cute.jit
    def wait_for_buffers(self, memory):
        """Returns when the set of store buffers used epi_sets chunks ago may be overwritten."""
        if memory.is_issuer:
            cute.arch.cp_async_bulk_wait_group(self.tile.epi_sets - 1, read=True)
        self.sync_warpgroup(memory)

    @cute.jit
    def sync_warpgroup(self, memory):
        cute.arch.barrier(
            barrier_id=FIRST_EPILOGUE_BARRIER + memory.group, number_of_threads=WARPGROUP
        )

    @cute.jit
    def publish(self, memory):
        """Makes the warpgroup's shared stores visible to TMA."""
        cute.arch.fence_proxy("async.shared", space="cta")
        self.sync_warpgroup(memory)

    def chunk_copies(self, chunk_mma, memory) -> tuple:
        """(store copy, its shared view, load copy, its shared view) of a chunk's fragments."""
        store_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        load_atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype)
        store = cute.make_tiled_copy_C(store_atom, chunk_mma)
        load = cute.make_tiled_copy_C(load_atom, chunk_mma)
        sTo = store.get_slice(memory.thread).partition_D(memory.sStore)
        sFrom = load.get_slice(memory.thread).partition_S(memory.sLoad)
        return store, sTo, load, sFrom

    def make_chunk(self, chunk_mma) -> cute.Tensor:
        """Registers for one chunk in the operands' type: epi_n / 2 values a thread."""
        shape = chunk_mma.partition_shape_C((WARPGROUP_ROWS, self.tile.epi_n))
        return cute.make_rmem_tensor(shape, self.dtype)

    def store_buffer(self, memory, store_set: int, which: int):
        """Index of a warpgroup's store buffer."""
        return memory.group * self.stores_per_group + store_set * self.gemm.stores + which

    def load_buffer(self, memory, load_set: int, which: int):
        """Index of a warpgroup's load buffer."""
        return memory.group * self.loads_per_group + load_set * self.gemm.loads + which

    def acc_index(self, block: int, source: int, chunk: int) -> int:
        """First accumulator of a chunk: a block of 64 rows holds N / 2, gate before up."""
        tile_n = self.tile.tile_n
        return (block * tile_n + source * self.gemm.n_step + chunk * self.tile.epi_n) // 2

    @cute.jit
    def partition_boxes(
        self,
        tma_map,
        sBoxes,
        gTensor,
        inner_tiles: cutlass.Constexpr,
        box: cutlass.Constexpr = None,
    ):
        """(shared, global) TMA partition into boxes that a CTA moves alone; chunks by default."""
        gBoxes = cute.local_tile(gTensor, self.chunk if box is None else box, inner_tiles)
        return cpasync.tma_partition(
            tma_map.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(sBoxes, 0, 2),
            cute.group_modes(gBoxes, 0, 2),
        )
