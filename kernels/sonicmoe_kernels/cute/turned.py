"""Turned tiles: an expert's rows lie along N of the product, its weights along M.

Legend: R rows of all experts, D columns of the result; a tile is up to tile_n rows by 128 columns,
its width its rows rounded up (RowGemm.widths); block: 64 columns, a wgmma; chunk: epi_n
rows by 64 columns, a store; box: 32 rows of A, a load.

wgmma takes M by 64 and N by 8. With rows along M an expert of 530 rows has four tiles of 128 and
one of 18, which takes as long as the others: it brings weights that it shares with nobody, and its
products are padded to 64 rows. With rows along N it has three tiles of 184, and all experts' tiles
are alike: the CTAs of a cluster share the rows and have their own weights.

How wide a tile is is known on the device only, so every width has code of its own, main loop and
epilogue: what the widths shared, registers of sums above all, would be moved where their paths
meet. As in ping-pong a warpgroup has every second tile, and stores it under the other's products.
The sums are transposed on their way to shared memory.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int16, Int32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp
from cutlass.tensor_utils import LayoutEnum

from sonicmoe_kernels.cute import schedule
from sonicmoe_kernels.cute.d_input import DInput
from sonicmoe_kernels.cute.down import Down
from sonicmoe_kernels.cute.grouped_gemm_m import MULTICAST_MASK, GroupedGemmM, TmaMap
from sonicmoe_kernels.cute.tma_ragged import expert_rows
from sonicmoe_kernels.tiles import (
    CLUSTER,
    ELEMENT_BYTES,
    TILE_K,
    TILE_M,
    TURNED_BOX_ROWS,
    WARPGROUP_ROWS,
    RowGemm,
)

BLOCK = WARPGROUP_ROWS
BLOCKS = TILE_M // BLOCK
BOX_ROWS = TURNED_BOX_ROWS
ROW_BYTES = TILE_K * ELEMENT_BYTES  # of a row in a stage
SWIZZLED_ROWS = 8  # over which the 128-byte swizzle repeats
ROWS_AT_ONCE = 16  # that a warp stores in one instruction, with 16 columns
VALUES = 8  # of a thread in it


def stored_at(thread: Int32) -> Int32:
    """Element of a chunk in shared memory whose 16 bytes a thread addresses for stmatrix.

    Four matrices of 8 columns by 8 rows of the result: two octets of columns, of two octets of
    rows. A warp holds 16 columns; rows are 128 bytes, swizzled.
    """
    lane = thread % 32
    row, matrix = lane % 8, lane // 8
    octet = thread // 32 * 2 + matrix % 2
    return (matrix // 2 * 8 + row) * BLOCK + (octet ^ row) * 8


class TurnedOutput(NamedTuple):
    """Where a tile lies: rows [row, length) of the expert that begins at `first`."""

    first: Int32
    length: Int32
    row: Int32
    n: Int32
    width: Int32


class Turned(GroupedGemmM):
    """What a kernel that gathers nothing does otherwise. MMA's A are the weights, its B is A."""

    def __init__(self, gemm: RowGemm):
        super().__init__(gemm)
        self.shared_by = 1  # every CTA has weights of its own
        self.boxes = gemm.tile_rows // BOX_ROWS
        self.widths = gemm.widths

    # ------------------------------------------------------------------ host

    def make_layouts(self):
        super().make_layouts()
        tile, dtype = self.tile, self.dtype
        k_major = LayoutEnum.ROW_MAJOR
        shape = (TILE_M, tile.tile_n, TILE_K)
        self.a_layout = sm90.make_smem_layout_b(k_major, shape, dtype, tile.stages)
        self.b_smem_layout = sm90.make_smem_layout_a(self.b_layout, shape, dtype, tile.stages)
        self.source_layout = self.b_smem_layout
        self.store_layout = sm90.make_smem_layout_epi(
            dtype, k_major, (tile.epi_n, BLOCK), self.gemm.store_buffers
        )

    def box_layout(self) -> cute.ComposedLayout:
        """Shared layout of the boxes of all stages."""
        shape, boxes = (TILE_M, BOX_ROWS, TILE_K), self.boxes * self.tile.stages
        return sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, shape, self.dtype, boxes)

    def weight_maps(self, mW: cute.Tensor) -> TmaMap:
        """TMA map of mW (E, rows, columns), seen as (M, K, E)."""
        one_stage = cute.slice_(self.source_layout, (None, None, 0))
        operation = cpasync.CopyBulkTensorTileG2SOp()
        box = (TILE_M, TILE_K)
        return TmaMap(*cpasync.make_tiled_tma_atom(operation, self.weight_view(mW), one_stage, box))

    def contiguous_a(self, mA: cute.Tensor) -> TmaMap:
        """TMA map of A (R_max, K), of boxes that the cluster's CTAs load by halves for both."""
        one_box = cute.slice_(self.box_layout(), (None, None, 0))
        operation = cpasync.CopyBulkTensorTileG2SMulticastOp()
        box = (BOX_ROWS, TILE_K)
        return TmaMap(
            *cpasync.make_tiled_tma_atom(operation, mA, one_box, box, num_multicast=CLUSTER)
        )

    def store_map(self, view: cute.Tensor) -> TmaMap:
        """Map for storing chunks."""
        chunk = cute.slice_(self.store_layout, (None, None, 0))
        operation = cpasync.CopyBulkTensorTileS2GOp()
        box = (self.tile.epi_n, BLOCK)
        return TmaMap(*cpasync.make_tiled_tma_atom(operation, view, chunk, box))

    # ------------------------------------------------------ device: producer

    def tile_at(self, unit: Int32, rows: Int32, rank: Int32) -> schedule.TurnedTile:
        return schedule.turned_tile(unit, rows, rank, self.gemm.tile_rows)

    def partition_weight(self, maps: TmaMap, sSource: cute.Tensor, rank: Int32) -> tuple:
        """(shared, global) of a weight; global is (box, M, K, E)."""
        gTiles = cute.local_tile(maps.mTensor, (TILE_M, TILE_K), (None, None, None))
        return cpasync.tma_partition(
            maps.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(sSource, 0, 2),
            cute.group_modes(gTiles, 0, 2),
        )

    @cute.jit
    def load_by_tma(self, stages, state, loads, source: cutlass.Constexpr, k, expert, first, at):
        """Starts the loads of a stage: the CTA's weights, and its part of the rows for both."""
        boxes = (at.width + (BOX_ROWS - 1)) // BOX_ROWS
        barrier = stages.producer_get_barrier(state)
        with cute.arch.elect_one():
            stage_bytes = TILE_M * ROW_BYTES + boxes * (BOX_ROWS * ROW_BYTES)
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, stage_bytes)
        sWeight, gWeight = loads.sources[source]
        cute.copy(
            loads.weights[source].atom,
            gWeight[None, at.n, k, expert],
            sWeight[None, state.index],
            tma_bar_ptr=barrier,
        )
        sBoxes = cute.make_tensor(loads.sA.iterator, self.box_layout().outer)
        gRows = cute.domain_offset((first + at.row, 0), loads.a.mTensor)
        gBoxes = cute.local_tile(gRows, (BOX_ROWS, TILE_K), (None, None))
        sBox, gBox = cpasync.tma_partition(
            loads.a.atom,
            loads.rank,
            cute.make_layout(CLUSTER),
            cute.group_modes(sBoxes, 0, 2),
            cute.group_modes(gBoxes, 0, 2),
        )
        depth = source * (self.gemm.k // TILE_K) + k
        for box in cutlass.range(boxes, unroll=1):
            cute.copy(
                loads.a.atom,
                gBox[None, box, depth],
                sBox[None, state.index * self.boxes + box],
                tma_bar_ptr=barrier,
                mcast_mask=Int16(MULTICAST_MASK),
            )

    # ----------------------------------------------------- device: consumers

    def tile_operands(self, tiled_mma, chunk_mma, memory, sA, sB) -> tuple:
        """The shared tensors, from which each width makes its own."""
        return sA, sB

    def output_tile(self, first: Int32, length: Int32, at, memory) -> TurnedOutput:
        return TurnedOutput(first, at.end, at.row, at.n, at.width)

    @cute.jit
    def compute_tile(self, stages, read, release, operands, epilogue, memory, output, tiles_done):
        """Main loop and epilogue of the tile's width; (read, release) behind it."""
        for width in cutlass.range_constexpr(len(self.widths)):
            if output.width == self.widths[width]:
                own = self.operands_of(self.widths[width], *operands)
                read, release = self.main_loop(stages, read, release, own, memory)
                self.store_tile(epilogue, memory, own[1], output, self.widths[width])
        return read, release

    def operands_of(self, width: int, sA: cute.Tensor, sB: cute.Tensor) -> tuple:
        """Operands of the main loop of a width, with sums of its own."""
        mma = self.mma_of(width)
        thread_mma = mma.get_slice(0)
        sRows = cute.make_tensor(sA.iterator, self.rows_layout(width))
        rAcc = cute.make_rmem_tensor(mma.partition_shape_C((TILE_M, width)), Float32)
        rA = mma.make_fragment_A(thread_mma.partition_A(sB))
        rB = mma.make_fragment_B(thread_mma.partition_B(sRows))
        return mma, rAcc, rA, rB

    def mma_of(self, width: int) -> cute.TiledMma:
        """One warpgroup's product: a block of columns by `width` rows."""
        rows_major, shape = OperandMajorMode.K, (BLOCK, width)
        return sm90.make_trivial_tiled_mma(
            self.dtype, self.dtype, self.b_major, rows_major, Float32, (1, 1, 1), shape
        )

    def rows_layout(self, width: int) -> cute.Layout:
        """The first rows of every stage, as MMA's B; the pointer swizzles."""
        stage, swizzled = self.gemm.tile_rows * TILE_K, SWIZZLED_ROWS * TILE_K
        return cute.make_layout(
            ((SWIZZLED_ROWS, width // SWIZZLED_ROWS), (TILE_K, 1), (1, self.tile.stages)),
            stride=((TILE_K, swizzled), (1, 0), (0, stage)),
        )

    @cute.jit
    def store_tile(self, epilogue, memory, rAcc, output, width: cutlass.Constexpr):
        """Stores chunk after chunk, the blocks' in turn; clipped where the tile's rows end."""
        rows = self.tile.epi_n
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), self.dtype)
        sStore = cute.recast_ptr(memory.sStore.iterator, dtype=self.dtype)  # without the swizzle
        offset = stored_at(memory.thread)
        rValues = cute.make_rmem_tensor(VALUES, self.dtype)
        gRows = expert_rows(epilogue.mTensor, output.first, output.length, output.row)
        gChunks = cute.local_tile(gRows, (rows, BLOCK), (None, None))
        sChunk, gChunk = cpasync.tma_partition(
            epilogue.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(memory.sStore, 0, 2),
            cute.group_modes(gChunks, 0, 2),
        )
        for chunk in cutlass.range_constexpr(-(-width // rows)):
            for block in cutlass.range_constexpr(BLOCKS):
                buffer = self.store_buffer(memory, block % self.tile.epi_sets, 0)
                self.wait_for_buffers(memory)
                end = min(rows, width - chunk * rows)
                for row in cutlass.range_constexpr(0, end, ROWS_AT_ONCE):
                    begin = (block * width + chunk * rows + row) // 2
                    # Of 8 rows at the end the rest of the 16 are anything: they are clipped.
                    for i in cutlass.range_constexpr(min(VALUES, (end - row) // 2)):
                        rValues[i] = rAcc[begin + i].to(self.dtype)
                    target = (sStore + (offset + (buffer * rows + row) * BLOCK)).align(16)
                    cute.copy(atom, rValues, cute.make_tensor(target, cute.make_layout(VALUES)))
                self.publish(memory)
                if memory.is_issuer:
                    column = output.n * BLOCKS + block
                    cute.copy(epilogue.atom, sChunk[None, buffer], gChunk[None, chunk, column])
                    cute.arch.cp_async_bulk_commit_group()


class DownTurned(Turned, Down):
    """Down with turned tiles."""


class DInputTurned(Turned, DInput):
    """dX~ with turned tiles."""
