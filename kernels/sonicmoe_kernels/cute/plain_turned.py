"""Kernels 2 and 6, down and dX~, with turned tiles (turned.py), as in ping-pong: a warpgroup has
every second tile, two blocks of it, and stores it under the other's products.

Legend: as in turned.py; box: 32 rows of A, a load.

The CTAs of a cluster share the rows, half a box loaded by each for both, and have weights of their
own: all experts' tiles are alike, whatever their number.
"""

from functools import partial

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Int16, Int32
from cutlass.cute.nvgpu import cpasync

from sonicmoe_kernels.cute import schedule
from sonicmoe_kernels.cute.d_input import DInput
from sonicmoe_kernels.cute.down import Down
from sonicmoe_kernels.cute.grouped_gemm_m import MULTICAST_MASK, TmaMap
from sonicmoe_kernels.cute.tma_ragged import expert_rows
from sonicmoe_kernels.cute.turned import BLOCK, Turned, sum_at
from sonicmoe_kernels.tiles import (
    CLUSTER,
    ELEMENT_BYTES,
    TILE_K,
    TILE_M,
    TURNED_BOX_ROWS,
    RowGemm,
)

BOX_ROWS = TURNED_BOX_ROWS
ROW_BYTES = TILE_K * ELEMENT_BYTES  # of a row in a stage


class PlainTurned(Turned):
    """Base of the kernels that gather nothing and store C (R, N) as it is."""

    blocks = TILE_M // BLOCK

    def __init__(self, gemm: RowGemm):
        super().__init__(gemm)
        self.shared_by = 1  # every CTA has weights of its own
        self.boxes = gemm.tile_rows // BOX_ROWS

    # ------------------------------------------------------------------ host

    def make_operand_layouts(self):
        super().make_operand_layouts()
        shape = (TILE_M, self.tile.tile_n, TILE_K)
        layout = sm90.make_smem_layout_a(self.b_layout, shape, self.dtype, self.tile.stages)
        self.b_smem_layout = self.source_layout = layout

    def box_layout(self) -> cute.ComposedLayout:
        """Shared layout of the boxes of all stages."""
        return self.rows_layout_staged(BOX_ROWS, self.boxes * self.tile.stages)

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

    # ------------------------------------------------------ device: producer

    def tile_at(self, unit: Int32, rows: Int32, rank: Int32) -> schedule.TurnedTile:
        gemm, group = self.gemm, self.tile.row_group
        return schedule.turned_tile(unit, rows, rank, gemm.tile_rows, gemm.n_tiles, group)

    def partition_weight(self, maps: TmaMap, sSource: cute.Tensor, rank: Int32) -> tuple:
        """(shared, global) of a weight; global is (box, M, K, E)."""
        every_tile, box = (None, None, None), (TILE_M, TILE_K)
        return self.partition_boxes(maps, sSource, maps.mTensor, every_tile, box)

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

    def weights_of(self, sB: cute.Tensor, group: Int32) -> cute.Tensor:
        """All weights of a tile."""
        return sB

    @cute.jit
    def store_tile(self, epilogue, memory, rAcc, output, width: cutlass.Constexpr):
        """Stores chunk after chunk, the blocks' in turn; clipped where the tile's rows end."""
        rows = self.tile.epi_n
        gRows = expert_rows(epilogue.mTensor, output.first, output.length, output.row)
        sChunk, gChunk = self.partition_boxes(epilogue, memory.sStore, gRows, (None, None))
        for chunk in cutlass.range_constexpr(-(-width // rows)):
            for block in cutlass.range_constexpr(self.blocks):
                begin = (block * width + chunk * rows) // 2
                buffer = self.store_buffer(memory, block % self.tile.epi_sets, 0)
                self.wait_for_buffers(memory)
                left = min(rows, width - chunk * rows)
                self.write_chunk(memory, buffer, left, partial(sum_at, rAcc, begin))
                self.publish(memory)
                if memory.is_issuer:
                    column = output.n * self.blocks + block
                    cute.copy(epilogue.atom, sChunk[None, buffer], gChunk[None, chunk, column])
                    cute.arch.cp_async_bulk_commit_group()


class DownTurned(PlainTurned, Down):
    """Down with turned tiles."""


class DInputTurned(PlainTurned, DInput):
    """dX~ with turned tiles."""
