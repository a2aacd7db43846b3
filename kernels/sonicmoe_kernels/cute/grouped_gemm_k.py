"""Kernels 5 and 7, the weight gradients: a grouped GEMM whose inner dimension is an expert's rows.

    kernel 5: dW2_EDF[e] = dO[idx_e]^T A'_e             gathered dO, streamed A' (R, F)
    kernel 7: dW1_EFD[e], dW3_EFD[e] = dH_e^T X[idx_e]  gathered X, streamed dH (R, halves, F)

Both are one product G^T S per expert: G (rows, D) is gathered by token, S (rows, N) lies in order,
N = F or halves * F. Kernel 7 stores the product transposed, each half's columns to its own tensor.

Legend
    T tokens, D model width, F expert width, E experts, R routed rows, N columns of S
    M, N, K: a tile's part of D, of N and of an expert's rows; slab: 64 columns of N
    unit: what one cluster computes at once, `cluster` tiles that are neighbours along D
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cuda.bindings.driver import CUstream
from cutlass import Boolean, Float32, Int16, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp
from cutlass.tensor_utils import LayoutEnum

from sonicmoe_kernels.cute.epilogues import round_pair
from sonicmoe_kernels.cute.gather_k import (
    GATHER_THREADS,
    gather_tile_k,
    load_row_index,
    row_of_lane,
)
from sonicmoe_kernels.cute.main_loop import K_BLOCKS, WARPGROUP, MainLoop
from sonicmoe_kernels.cute.schedule_k import (
    expert_of_turn,
    next_level_unit,
    place_of,
    slot_of,
    start_loads,
    tracked_clusters,
    uneven,
    unit_of,
)
from sonicmoe_kernels.cute.tma_ragged import BIG, ragged_view
from sonicmoe_kernels.tiles import (
    THREADS,
    TILE_K,
    TILE_M,
    WARPGROUP_ROWS,
    WEIGHT_SLAB,
    WEIGHT_SORTED_EXPERTS,
    WEIGHT_STORE_BUFFERS,
    WeightGemm,
)

CONSUMERS = 2  # warpgroups of 64 rows of the tile
ROWS = WARPGROUP_ROWS
SLAB = WEIGHT_SLAB
STORE_BUFFERS = WEIGHT_STORE_BUFFERS // CONSUMERS  # per consumer
PRODUCER_REGISTERS = 56
CONSUMER_REGISTERS = 224
BARRIER_STORE = 1  # named barriers 1 and 2: one per consumer


class Walk(NamedTuple):
    """What decides the units of this CTA's cluster, the same for all its warps."""

    mOffsets: cute.Tensor
    sOrder: cute.Tensor
    num_experts: Int32
    units: Int32
    rank: Int32  # of the CTA in its cluster
    level: Int32  # 1 where waves leave out clusters that are ahead


class Work(NamedTuple):
    """One tile of this CTA: where it lies and the rows it sums over."""

    unit: Int32
    expert: Int32
    m: Int32
    n: Int32
    first: Int32
    rows: Int32


class Store(NamedTuple):
    """A TMA store of 64 x 64 sums and the coordinates it takes."""

    atom: cute.CopyAtom
    mOut: cute.Tensor


class SlabStore(NamedTuple):
    """How a consumer thread brings slabs of 64 x 64 sums to memory."""

    stores: tuple  # a Store for each output
    sOut: cute.Tensor  # (64, 64, 2 consumers * buffers)
    copy: cute.TiledCopy  # registers to shared memory
    tRsOut: cute.Tensor  # the thread's part of sOut
    held: list  # the thread's rounded sums, slab by slab
    consumer: Int32
    is_issuer: Boolean  # true in the one warp that talks to TMA


class GroupedGemmK(MainLoop):
    """Persistent, warp specialised: one producer warpgroup, two consumers of 64 x tile_n sums.

    The producer gathers G with cp.async (all four warps) and loads S by TMA (one lane), multicast
    in a cluster, whose tiles share it. Both operands are M-major in shared memory. Past an expert's
    end both are zeros (0 x NaN would be NaN): the gather fills zeros, and the tensor map of S ends
    where the expert does. An expert without rows runs one k tile of zeros: its gradient is written.

    A consumer rounds a unit's sums to 16 bits, which frees their registers (128 sums and 64 held
    words, of 224), and stores a slab of them under each of the next unit's first products. Stored
    before these they cost 1.2 k tiles of a unit: 10% with 512 rows an expert.

    Reads R*D*2 bytes of G for each of the n tiles and R*N*2 of S for each m unit, mostly from L2;
    writes E*D*N*2. FLOPs: 2*R*D*N. Shared memory per stage: (128 + tile_n) * 128 bytes.

    Measured (H100, 2026-11-27, bf16, balanced, medians of six rounds), TFLOPS of dW2 and of dW1
    with dW3: 570 and 659 at D 1536, F 256, 1536 rows an expert; 576 and 624 at D 4096, F 256, 2048
    rows; 531 and 587 at D 4096, F 1024, 512 rows. Sustained it draws 690 W at 1.45 GHz: time
    follows energy.
    """

    def __init__(self, gemm: WeightGemm):
        self.D, self.F, self.N = gemm.d, gemm.f, gemm.n
        self.dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[gemm.dtype]
        self.outputs = gemm.halves
        self.gathers = True
        self.transposed = gemm.kernel == "d_weight13"
        self.tile_n = gemm.tile.tile_n
        self.stages = gemm.tile.stages
        self.cluster = gemm.tile.cluster
        self.short_end = gemm.tile.short_end
        self.n_tiles, self.m_units = gemm.n_tiles, gemm.m_units

    @cute.jit
    def __call__(
        self,
        mG_TD: cute.Tensor,
        mIndex_R: cute.Tensor,
        mExpertOffsets: cute.Tensor,
        mS_RN: cute.Tensor,
        mOut: cute.Tensor,
        mOut2: cute.Tensor | None,
        num_ctas: Int32,
        stream: CUstream,
    ):
        tile = (TILE_M, self.tile_n, TILE_K)
        mma = sm90.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.MN,
            OperandMajorMode.MN,
            Float32,
            (CONSUMERS, 1, 1),
            (ROWS, self.tile_n),
        )
        mma_slab = sm90.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.MN,
            OperandMajorMode.MN,
            Float32,
            (1, 1, 1),
            (ROWS, SLAB),
        )
        layout_g = sm90.make_smem_layout_a(LayoutEnum.COL_MAJOR, tile, self.dtype, self.stages)
        layout_s = sm90.make_smem_layout_b(LayoutEnum.COL_MAJOR, tile, self.dtype, self.stages)
        order = LayoutEnum.COL_MAJOR if const_expr(self.transposed) else LayoutEnum.ROW_MAJOR
        layout_out = sm90.make_smem_layout_epi(
            self.dtype, order, (ROWS, SLAB), CONSUMERS * STORE_BUFFERS
        )

        rows_first = ragged_view(mS_RN.iterator, (self.N,), (1,), self.N)
        ragged_s = cute.make_tensor(
            rows_first.iterator, cute.select(rows_first.layout, mode=[1, 0, 2, 3])
        )
        load_s, tma_s = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SMulticastOp()
            if const_expr(self.cluster > 1)
            else cpasync.CopyBulkTensorTileG2SOp(),
            ragged_s,
            cute.slice_(layout_s, (None, None, 0)),
            (self.tile_n, TILE_K),
            num_multicast=self.cluster,
        )
        stores = (self.make_store(mOut, layout_out),)
        if const_expr(self.outputs == 2):
            stores = (*stores, self.make_store(mOut2, layout_out))

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[Int64, 2 * self.stages]
            order: cute.struct.MemRange[Int16, WEIGHT_SORTED_EXPERTS]
            sG: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout_g)], 1024]
            sS: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout_s)], 1024]
            sOut: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout_out)], 1024]

        self.Storage = Storage
        self.kernel(
            mG_TD,
            mIndex_R,
            mExpertOffsets,
            load_s,
            tma_s,
            stores,
            mOut.shape[0],
            mma,
            mma_slab,
            layout_g,
            layout_s,
            layout_out,
        ).launch(
            grid=[num_ctas, 1, 1],
            block=[THREADS, 1, 1],
            cluster=[self.cluster, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    def make_store(self, mOut: cute.Tensor, layout_out: cute.ComposedLayout) -> Store:
        """TMA store of 64 x 64 pieces of (D, F, E), whichever of D and F is contiguous."""
        stride = (1, self.D) if const_expr(self.transposed) else (self.F, 1)
        view = cute.make_tensor(
            mOut.iterator,
            cute.make_layout(
                (self.D, self.F, mOut.shape[0]), stride=(*stride, Int64(self.D * self.F))
            ),
        )
        one_buffer = cute.slice_(layout_out, (None, None, 0))
        operation = cpasync.CopyBulkTensorTileS2GOp()
        return Store(*cpasync.make_tiled_tma_atom(operation, view, one_buffer, (ROWS, SLAB)))

    @cute.kernel
    def kernel(
        self,
        mG_TD: cute.Tensor,
        mIndex_R: cute.Tensor,
        mExpertOffsets: cute.Tensor,
        load_s: cute.CopyAtom,
        tma_s: cute.Tensor,
        stores: tuple,
        num_experts: Int32,
        mma: cute.TiledMma,
        mma_slab: cute.TiledMma,
        layout_g: cute.ComposedLayout,
        layout_s: cute.ComposedLayout,
        layout_out: cute.ComposedLayout,
    ):
        thread = cute.arch.thread_idx()[0]
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        role = cute.arch.make_warp_uniform(thread // WARPGROUP)
        if warp_index == 0:
            cpasync.prefetch_descriptor(load_s)
            for store in stores:
                cpasync.prefetch_descriptor(store.atom)
        storage = cutlass.memory.SmemAllocator().allocate(self.Storage)
        rank = Int32(0)
        if const_expr(self.cluster > 1):
            rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        ring = pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.barriers.data_ptr(),
            num_stages=self.stages,
            # One arrival that expects the bytes of S, and one for each thread that gathers.
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1 + GATHER_THREADS),
            consumer_group=pipeline.CooperativeGroup(
                pipeline.Agent.Thread, CONSUMERS * (WARPGROUP // 32) * self.cluster
            ),
            tx_count=self.tile_n * TILE_K * self.dtype.width // 8,
            cta_layout_vmnk=cute.make_layout((1, self.cluster, 1, 1)),
            defer_sync=True,
        )
        cute.arch.mbarrier_init_fence()
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        sOrder = storage.order.get_tensor(cute.make_layout(WEIGHT_SORTED_EXPERTS))
        scratch = cute.recast_ptr(storage.sOut.data_ptr(), dtype=Int32)
        sRows = cute.make_tensor(scratch, cute.make_layout(WEIGHT_SORTED_EXPERTS))
        self.sort_experts(mExpertOffsets, num_experts, sRows, sOrder)
        if const_expr(self.cluster > 1):
            cute.arch.cluster_wait()
        cute.arch.sync_threads()
        units = num_experts * (self.m_units * self.n_tiles)
        level = self.wants_level_waves(mExpertOffsets, num_experts, sOrder)
        walk = Walk(mExpertOffsets, sOrder, num_experts, units, rank, level)
        sG = storage.sG.get_tensor(layout_g.outer, swizzle=layout_g.inner)
        sS = storage.sS.get_tensor(layout_s.outer, swizzle=layout_s.inner)
        sOut = storage.sOut.get_tensor(layout_out.outer, swizzle=layout_out.inner)
        if role == 0:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            self.produce(ring, walk, mG_TD, mIndex_R, load_s, tma_s, sG, sS, warp_index)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            self.consume(ring, walk, mma, mma_slab, stores, sG, sS, sOut, role - 1)
        if const_expr(self.cluster > 1):
            # A CTA's barriers must outlive the last release that its neighbour sends it.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def sort_experts(
        self, mOffsets: cute.Tensor, num_experts: Int32, sRows: cute.Tensor, sOrder: cute.Tensor
    ):
        """Writes sOrder, the experts by rows, longest first. The caller synchronises the block.

        All threads take every turn, some with an expert that another has too: after a loop whose
        length differs between threads, the compiler puts each TMA and barrier into a loop over
        lanes, and the whole kernel is 5% slower (H100, 2026-11-22).
        """
        thread = cute.arch.thread_idx()[0]
        if num_experts <= WEIGHT_SORTED_EXPERTS:
            for start in cutlass.range(0, num_experts, THREADS):
                expert = expert_of_turn(start, thread, num_experts)
                sRows[expert] = mOffsets[expert + 1] - mOffsets[expert]
            cute.arch.sync_threads()
            for start in cutlass.range(0, num_experts, THREADS):
                expert = expert_of_turn(start, thread, num_experts)
                sOrder[slot_of(expert, sRows, num_experts)] = Int16(expert)

    @cute.jit
    def wants_level_waves(
        self, mOffsets: cute.Tensor, num_experts: Int32, sOrder: cute.Tensor
    ) -> Int32:
        """1 if waves for everybody would give some clusters much more than their part, else 0."""
        level = Int32(0)
        if num_experts <= WEIGHT_SORTED_EXPERTS:
            longest = Int32(sOrder[0])
            rows = mOffsets[longest + 1] - mOffsets[longest]
            clusters = cute.arch.grid_dim()[0] // self.cluster
            units = self.m_units * self.n_tiles
            level = uneven(rows, mOffsets[num_experts], num_experts, units, clusters)
        return cute.arch.warp_redux_sync(level, "max")

    @cute.jit
    def work_at(self, walk: Walk, unit: Int32) -> Work:
        """This CTA's tile of a unit; past the last one its expert and rows are anybody's."""
        slot, m, n = place_of(cutlass.min(unit, walk.units - 1), self.m_units, self.n_tiles)
        expert = slot
        if walk.num_experts <= WEIGHT_SORTED_EXPERTS:
            expert = Int32(walk.sOrder[slot])
        first = walk.mOffsets[expert]
        rows = walk.mOffsets[expert + 1] - first
        return Work(unit, expert, m * self.cluster + walk.rank, n, first, rows)

    def before_first_wave(self) -> tuple:
        """What `next_work` carries from wave to wave.

        The load of the lane's clusters, the next wave, and its first unit.
        """
        rLoads = cute.make_rmem_tensor(tracked_clusters(self.cluster), Int32)
        rNext = cute.make_rmem_tensor(2, Int32)
        start_loads(rLoads, cute.arch.lane_idx(), cute.arch.grid_dim()[0] // self.cluster)
        rNext.fill(0)
        return rLoads, rNext

    @cute.jit
    def next_work(self, walk: Walk, rLoads: cute.Tensor, rNext: cute.Tensor) -> Work:
        """This CTA's next tile; all lanes of a warp call it together."""
        cluster = cute.arch.block_idx()[0] // self.cluster
        clusters = cute.arch.grid_dim()[0] // self.cluster
        unit = unit_of(rNext[0], cluster, clusters)
        if walk.level == 0:
            rNext[0] += 1
        else:
            unit = next_level_unit(
                rLoads, rNext, cluster, walk.units, lambda unit: self.cost(walk, unit)
            )
        work = self.work_at(walk, unit)
        # The same in all lanes, which the compiler must see: it puts TMA into loops otherwise.
        return work._replace(expert=cute.arch.warp_redux_sync(work.expert, "max"))

    @cute.jit
    def cost(self, walk: Walk, unit: Int32) -> Int32:
        """k tiles of a unit, and one for its epilogue."""
        return self.k_tiles(self.work_at(walk, unit).rows) + 1

    @cute.jit
    def k_tiles(self, rows: Int32) -> Int32:
        return cutlass.max((rows + (TILE_K - 1)) // TILE_K, 1)

    @cute.jit
    def produce(
        self,
        ring: pipeline.PipelineTmaAsync,
        walk: Walk,
        mG_TD: cute.Tensor,
        mIndex_R: cute.Tensor,
        load_s: cute.CopyAtom,
        tma_s: cute.Tensor,
        sG: cute.Tensor,
        sS: cute.Tensor,
        warp_index: Int32,
    ):
        """Fills the stages of all k tiles of all units; indices and offsets are loaded ahead."""
        thread = cute.arch.thread_idx()[0]
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        kept_row = row_of_lane(cute.arch.lane_idx(), warp_index, TILE_M)
        stage_pointer = cute.recast_ptr(sG.iterator, dtype=self.dtype)  # without swizzle
        everyone = Int16((1 << self.cluster) - 1)
        waves = self.before_first_wave()
        work = self.next_work(walk, *waves)
        index = load_row_index(mIndex_R, work.first, kept_row, work.rows)
        while work.unit < walk.units:
            next_work = self.next_work(walk, *waves)
            end = work.first + work.rows
            gS = cute.local_tile(
                cute.domain_offset((0, BIG - work.rows), tma_s[None, None, BIG, end]),
                (self.tile_n, TILE_K),
                (work.n, None),
            )
            tSsS, tSgS = cpasync.tma_partition(
                load_s,
                walk.rank,
                cute.make_layout(self.cluster),
                cute.group_modes(sS, 0, 2),
                cute.group_modes(gS, 0, 2),
            )
            k_tiles = self.k_tiles(work.rows)
            for k in cutlass.range(k_tiles, unroll=1):
                first, row, rows = work.first, (k + 1) * TILE_K + kept_row, work.rows
                if k + 1 == k_tiles:
                    first, row, rows = next_work.first, kept_row, next_work.rows
                next_index = load_row_index(mIndex_R, first, row, rows)
                ring.sync_object_empty.wait(state.index, state.phase)
                barrier = ring.producer_get_barrier(state)
                if warp_index == 0:
                    ring.sync_object_full.arrive(state.index, None)
                    if const_expr(self.cluster > 1):
                        cute.copy(
                            load_s,
                            tSgS[None, k],
                            tSsS[None, state.index],
                            tma_bar_ptr=barrier,
                            mcast_mask=everyone,
                        )
                    else:
                        cute.copy(
                            load_s, tSgS[None, k], tSsS[None, state.index], tma_bar_ptr=barrier
                        )
                sTile = stage_pointer + state.index * (TILE_M * TILE_K)
                gather_tile_k(mG_TD, index, work.m * TILE_M, sTile, thread, TILE_M, self.D)
                cute.arch.cp_async_mbarrier_arrive_noinc(barrier)
                index = next_index
                state.advance()
            work = next_work

    @cute.jit
    def consume(
        self,
        ring: pipeline.PipelineTmaAsync,
        walk: Walk,
        mma: cute.TiledMma,
        mma_slab: cute.TiledMma,
        stores: tuple,
        sG: cute.Tensor,
        sS: cute.Tensor,
        sOut: cute.Tensor,
        consumer: Int32,
    ):
        """Sums 64 x tile_n of every unit; stores it in slabs during the next unit or at the end."""
        thread, shape = consumer * WARPGROUP, (TILE_M, self.tile_n)
        operands = self.make_operands(mma, thread, shape, sG, sS)
        rSum = operands[1]
        slabs = self.tile_n // SLAB
        slab_shape = mma_slab.partition_shape_C((ROWS, SLAB))
        rHeld = [cute.make_rmem_tensor(slab_shape, self.dtype) for _ in range(slabs)]
        out = self.make_slab_store(mma_slab, stores, sOut, consumer, rHeld)
        for rSlab in rHeld:
            rSlab.fill(0)

        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        release = state.clone()
        waves = self.before_first_wave()
        work = self.next_work(walk, *waves)
        held = work._replace(m=Int32(self.D))  # beyond all rows: nothing is stored
        while work.unit < walk.units:
            k_tiles = self.k_tiles(work.rows)
            next_work = work
            # No product is in flight where both ways meet: the compiler would wait for every one.
            if k_tiles < slabs:  # not enough to store under
                for c in cutlass.range_constexpr(slabs):
                    self.put_slab(out, held, c)
                next_work = self.next_work(walk, *waves)
                state = self.start_stage(ring, state, operands, False)
                state, release = self.multiply_stages(
                    ring, state, release, operands, Int32(1), k_tiles
                )
                release = self.finish_stage(ring, release, 0)
                if const_expr(self.short_end):
                    self.hold(rSum, rHeld)
            elif const_expr(not self.short_end):
                state, release, next_work = self.multiply_unit(
                    ring, state, release, operands, k_tiles, K_BLOCKS, out, held, walk, waves
                )
            else:
                blocks = self.last_blocks(work.rows, k_tiles)
                for count in cutlass.range_constexpr(1, K_BLOCKS + 1):
                    if blocks == count:
                        # Sums of its own: shared ones would be moved where the ways meet.
                        own = self.make_operands(mma, thread, shape, sG, sS)
                        state, release, next_work = self.multiply_unit(
                            ring, state, release, own, k_tiles, count, out, held, walk, waves
                        )
                        self.hold(own[1], rHeld)
            if const_expr(not self.short_end):
                self.hold(rSum, rHeld)
            held = work
            work = next_work
        for c in cutlass.range_constexpr(slabs):
            self.put_slab(out, held, c)
        if out.is_issuer:
            cute.arch.cp_async_bulk_wait_group(0, read=False)

    @cute.jit
    def last_blocks(self, rows: Int32, k_tiles: Int32) -> Int32:
        """Blocks of 16 rows to multiply of the last k tile; all, where it is stored under."""
        blocks = Int32(K_BLOCKS)
        if k_tiles > self.tile_n // SLAB:
            blocks = (rows - (k_tiles - 1) * TILE_K + 15) // 16
        return blocks

    @cute.jit
    def multiply_unit(
        self,
        ring,
        state,
        release,
        operands,
        k_tiles,
        blocks: cutlass.Constexpr,
        out,
        held,
        walk,
        waves,
    ):
        """The products of a unit, of its last k tile those of `blocks`, and stores under the first.

        (state, release, what is next) behind it.
        """
        slabs = self.tile_n // SLAB
        for c in cutlass.range_constexpr(slabs):
            state = self.start_stage(ring, state, operands, c > 0)
            self.put_slab(out, held, c)
            if const_expr(c > 0):
                release = self.finish_stage(ring, release, 1)
        next_work = self.next_work(walk, *waves)
        whole = k_tiles
        if const_expr(blocks < K_BLOCKS):
            whole = k_tiles - 1
        state, release = self.multiply_stages(ring, state, release, operands, Int32(slabs), whole)
        if const_expr(blocks < K_BLOCKS):
            state = self.start_stage(ring, state, operands, True, blocks)
            release = self.finish_stage(ring, release, 1)
        release = self.finish_stage(ring, release, 0)
        return state, release, next_work

    def hold(self, rSum: cute.Tensor, rHeld: list):
        """Rounds a unit's sums."""
        for c in range(len(rHeld)):
            self.hold_slab(rSum, rHeld[c], c)

    def hold_slab(self, rSum: cute.Tensor, rSlab: cute.Tensor, c: int):
        """Rounds the sums of slab `c`, which frees their registers."""
        rWords = cute.recast_tensor(rSlab, Int32)
        words = cute.size(rWords)
        for i in range(words):
            first = (c * words + i) * 2
            rWords[i] = round_pair(rSum[first], rSum[first + 1], self.dtype)

    def make_slab_store(self, mma_slab, stores, sOut, consumer, rHeld: list) -> SlabStore:
        """How a consumer stores the slabs in rHeld."""
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(self.transposed, 4), self.dtype)
        copy_slab = cute.make_tiled_copy_C(atom, mma_slab)
        thread_copy = copy_slab.get_slice(cute.arch.thread_idx()[0] % WARPGROUP)
        is_issuer = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4 == 0
        tRsOut = thread_copy.partition_D(sOut)
        held = [thread_copy.retile(rSlab) for rSlab in rHeld]
        return SlabStore(stores, sOut, copy_slab, tRsOut, held, consumer, is_issuer)

    @cute.jit
    def put_slab(self, out: SlabStore, work: Work, c: cutlass.Constexpr):
        """Brings slab `c` of a tile to shared memory and starts its store."""
        slabs = self.tile_n // SLAB
        barrier_id = BARRIER_STORE + out.consumer
        # An odd number of slabs uses buffer 0 twice in a row, last and first.
        pending = 0 if const_expr(c == 0 and slabs % 2 == 1) else STORE_BUFFERS - 1
        buffer = out.consumer * STORE_BUFFERS + c % STORE_BUFFERS
        if out.is_issuer:
            cute.arch.cp_async_bulk_wait_group(pending, read=True)
        cute.arch.barrier(barrier_id=barrier_id, number_of_threads=WARPGROUP)
        cute.copy(out.copy, out.held[c], out.tRsOut[None, None, None, buffer])
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=barrier_id, number_of_threads=WARPGROUP)
        if out.is_issuer:
            slab = work.n * slabs + c
            self.store_slab(out.stores, out.sOut, buffer, work, out.consumer, slab)
            # Also without a store: the wait above counts groups.
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def store_slab(
        self,
        stores: tuple,
        sOut: cute.Tensor,
        buffer: Int32,
        work: Work,
        consumer: Int32,
        slab: Int32,
    ):
        """Starts the store of 64 x 64 sums unless they lie beyond D or N."""
        row = work.m * CONSUMERS + consumer
        slabs_of_half = self.F // SLAB
        for half in cutlass.range_constexpr(self.outputs):
            first = half * slabs_of_half
            if row * ROWS < self.D and slab >= first and slab < first + slabs_of_half:
                store = stores[half]
                gOut = cute.local_tile(
                    store.mOut, (ROWS, SLAB, 1), (row, slab - first, work.expert)
                )
                tOsOut, tOgOut = cpasync.tma_partition(
                    store.atom,
                    0,
                    cute.make_layout(1),
                    cute.group_modes(sOut, 0, 2),
                    cute.group_modes(gOut, 0, 3),
                )
                cute.copy(store.atom, tOsOut[None, buffer], tOgOut)
