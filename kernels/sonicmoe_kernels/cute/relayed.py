"""The relayed schedule of a ragged-M kernel with one weight: an epilogue that runs under the next
tile's main loop.

Legend: M tile rows (128), N tile columns, block = 64 rows of a tile, slice = 16 rows of a block,
chunk = 64 rows by epi_n columns of shared memory, unit = one slice's part of a chunk, place = a
slice's 16 rows of a chunk that serves as buffer. m = global, g = tile, s = shared, r = register.

Warp roles, 384 threads a CTA: warps 0 and 1 produce, warps 2 and 3 run the epilogue of a block
each, warpgroups 1 and 2 multiply a block each. A cooperative tile stops the tensor cores while its
epilogue waits for memory; here they stop for as long as it takes to round the sums to 16 bits and
write them to shared memory, whose M * N * 2 bytes cost a stage of the main loop.

An epilogue warp stands in for the four warps that hold a block's sums, slice after slice: what a
slice's fragments look like does not depend on who reads them. It shares nothing with other warps
but two barriers: `full` when the sums are there (128 arrivals, one of every thread that wrote
them), `empty` when they have been used (one, after the last store has read). A block without rows
of the expert is neither handed over nor waited for.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.tensor_utils import LayoutEnum

from sonicmoe_kernels.cute.grouped_gemm_m import (
    WARPGROUP,
    GroupedGemmM,
    OutputTile,
    TmaMap,
)
from sonicmoe_kernels.tiles import SLICES, TILE_M, WARPGROUP_ROWS

BLOCKS = TILE_M // WARPGROUP_ROWS
SLICE_ROWS = WARPGROUP_ROWS // SLICES
PRODUCER_WARPS = 2
# With 168 at launch, three warpgroups share 504. Consumers hold N / 2 sums a thread, at most 128.
PRODUCER_REGISTERS = 120  # also of the epilogue's warps
CONSUMER_REGISTERS = 192


class Relayed(GroupedGemmM):
    """Base of kernels with this schedule: a subclass says how a slice is finished."""

    def __init__(self, gemm):
        super().__init__(gemm)
        self.producer_warps = PRODUCER_WARPS
        self.producer_registers = PRODUCER_REGISTERS
        self.consumer_registers = CONSUMER_REGISTERS

    # ------------------------------------------------------------------ host

    def slice_layout(self, slices: int) -> cute.ComposedLayout:
        """Chunks seen as slices: slice i of chunk c is number c * SLICES + i, the same bytes."""
        shape = (SLICE_ROWS, self.tile.epi_n)
        return sm90.make_smem_layout_epi(self.dtype, LayoutEnum.ROW_MAJOR, shape, slices)

    def slice_map(self, operation, view: cute.Tensor) -> TmaMap:
        """Map of boxes of one slice by epi_n columns."""
        one = cute.slice_(self.slice_layout(1), (None, None, 0))
        box = (SLICE_ROWS, self.tile.epi_n)
        return TmaMap(*cpasync.make_tiled_tma_atom(operation, view, one, box))

    def store_map(self, view: cute.Tensor) -> TmaMap:
        return self.slice_map(cpasync.CopyBulkTensorTileS2GOp(), view)

    def load_map(self, view: cute.Tensor) -> TmaMap:
        return self.slice_map(cpasync.CopyBulkTensorTileG2SOp(), view)

    # -------------------------------------------- device: what both sides use

    def barrier_arrivals(self, barrier: int) -> int:
        """Full barriers, behind those of the load sets: 128; others: the one who issues."""
        full = range(BLOCKS * self.tile.load_sets, BLOCKS * self.tile.load_sets + BLOCKS)
        return WARPGROUP if barrier in full else 1

    def full_barrier(self, memory) -> cute.Pointer:
        """The barrier that says that the sums of the block `memory.group` are there."""
        return memory.barriers + BLOCKS * self.tile.load_sets + memory.group

    def empty_barrier(self, memory) -> cute.Pointer:
        """The barrier that says that the sums of the block `memory.group` have been used."""
        return memory.barriers + BLOCKS * self.tile.load_sets + BLOCKS + memory.group

    def handed_chunk(self, memory, chunk: int):
        """Index among the store buffers of a chunk of the block `memory.group`."""
        return memory.group * self.gemm.epi_chunks + chunk

    # ----------------------------------------------------- device: consumers

    def epilogue_registers(self) -> tuple:
        """Consumers carry none."""
        return ()

    @cute.jit
    def before_main_loop(self, epilogue, registers, memory, output):
        """Nothing: the epilogue's own warps load what it needs."""

    @cute.jit
    def run_epilogue(self, epilogue, registers, memory, chunk_mma, rAcc, output, tiles_done):
        """Hands a block's sums over. The first wait passes: nobody has used the block before."""
        copy, sTo, _, _ = self.chunk_copies(chunk_mma, memory)
        rChunk = self.make_chunk(chunk_mma)
        tChunk = copy.get_slice(memory.thread).retile(rChunk)
        cute.arch.mbarrier_wait(self.empty_barrier(memory), (tiles_done % 2) ^ 1)
        for chunk in cutlass.range_constexpr(self.gemm.epi_chunks):
            first = self.acc_index(0, 0, chunk)
            for i in cutlass.range_constexpr(cute.size(rChunk)):
                rChunk[i] = rAcc[first + i].to(self.dtype)
            at = self.handed_chunk(memory, chunk)
            cute.copy(copy, tChunk, sTo[None, None, None, at])
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.mbarrier_arrive(self.full_barrier(memory))

    # ------------------------------------------------- device: epilogue warps

    @cute.jit
    def run_epilogues(self, walk, chunk_mma, epilogue, memory):
        """Finishes the block `memory.group` of all tiles of this CTA; `memory.thread` is a lane."""
        gemm = self.gemm
        expert = Int32(0)
        unit = walk.cluster
        total = walk.sStart[gemm.num_experts]
        blocks_done, slices_done = Int32(0), Int32(0)
        registers = self.warp_registers()
        while unit < total:
            expert, first, length, at = self.locate(walk, unit, expert)
            row = at.m * TILE_M + memory.group * WARPGROUP_ROWS
            if row < length:
                output = OutputTile(first, length, row, at.n)
                self.before_block(epilogue, registers, memory, output)
                cute.arch.mbarrier_wait(self.full_barrier(memory), blocks_done % 2)
                slices = cutlass.min((length - row + SLICE_ROWS - 1) // SLICE_ROWS, SLICES)
                for i in cutlass.range(slices, unroll=1):
                    self.finish_slice(
                        epilogue, registers, memory, chunk_mma, output, i, slices, slices_done + i
                    )
                # All lanes have read the sums, and the stores have what replaced them.
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(self.empty_barrier(memory))
                blocks_done += 1
                slices_done += slices
            unit += walk.clusters
        cute.arch.cp_async_bulk_wait_group(0, read=False)

    def warp_registers(self) -> tuple:
        """Registers that an epilogue warp carries from slice to slice; none by default."""
        return ()

    @cute.jit
    def before_block(self, epilogue, registers, memory, output):
        """What an epilogue starts before a block's sums are there; nothing by default."""

    @cute.jit
    def finish_slice(self, epilogue, registers, memory, chunk_mma, output, i, slices, slices_done):
        """Stores the results of the block's slice i (of `slices` that have rows).

        slices_done: how many slices of all blocks this warp has finished before.
        """
        raise NotImplementedError

    def slice_copies(self, chunk_mma, memory, sBuffers: cute.Tensor, i: Int32) -> tuple:
        """(store, its view, load, its view) of slice i's fragments in all chunks of `sBuffers`."""
        thread = i * 32 + memory.thread  # of the warpgroup that an epilogue warp stands in for
        store_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        load_atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype)
        store = cute.make_tiled_copy_C(store_atom, chunk_mma)
        load = cute.make_tiled_copy_C(load_atom, chunk_mma)
        sTo = store.get_slice(thread).partition_D(sBuffers)
        return store, sTo, load, load.get_slice(thread).partition_S(sBuffers)

    @cute.jit
    def partition_slices(self, tma_map, sBuffers, gRows, inner_tiles: cutlass.Constexpr):
        """TMA partition of shared chunks and of (rows, columns, ...) coordinates into slices."""
        layout = self.slice_layout(SLICES * cute.size(sBuffers, mode=[2]))
        sSlices = cute.make_tensor(sBuffers.iterator, layout.outer)
        box = (SLICE_ROWS, self.tile.epi_n)
        return self.partition_boxes(tma_map, sSlices, gRows, inner_tiles, box)

    @cute.jit
    def publish_slice(self):
        """Makes the warp's shared stores visible to TMA."""
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
