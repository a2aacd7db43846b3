"""Kernel 1, up, with turned tiles (turned.py), as in the cooperative schedule: both warpgroups work
on every tile, each on 64 of its 128 columns of F.

Legend: as in turned.py; F expert width, halves 2 when gated.

A warpgroup's blocks are the same 64 columns of W1 and of W3, so gate and up of a column meet in one
thread's sums. Two tiles of an expert share the weights in a cluster; an odd one has two columns of
tiles. Rows are gathered as far as a tile is wide.
"""

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from sonicmoe_kernels.cute import gather, schedule
from sonicmoe_kernels.cute.epilogues import activate
from sonicmoe_kernels.cute.grouped_gemm_m import GroupedGemmM
from sonicmoe_kernels.cute.tma_ragged import expert_rows
from sonicmoe_kernels.cute.turned import BLOCK, SWIZZLED_ROWS, Turned, sum_at
from sonicmoe_kernels.cute.up import Up
from sonicmoe_kernels.tiles import TILE_K, TILE_M, RowGemm


def activated_at(activation: str, rAcc: cute.Tensor, begins: list[int], i: int) -> Float32:
    """A, from the sums of both halves."""
    return activate(activation, tuple(rAcc[begin + i] for begin in begins))


class UpTurned(Turned, Up):
    """Three stores a chunk behind one pair of barriers: gate, up, A."""

    def __init__(self, gemm: RowGemm):
        super().__init__(gemm)
        self.blocks = gemm.halves
        self.group_elements = BLOCK * TILE_K  # of a half, between the warpgroups' columns

    def make_operand_layouts(self):
        super().make_operand_layouts()
        self.b_smem_layout = self.source_layout  # 128 columns of W1, then of W3

    # ------------------------------------------------------ device: producer

    def tile_at(self, unit: Int32, rows: Int32, rank: Int32) -> schedule.TurnedTile:
        at = GroupedGemmM.tile_at(self, unit, rows, rank)
        width = schedule.turned_width(rows, self.gemm.tile_rows)
        row = at.m * width
        end = cutlass.min(row + width, rows)
        return schedule.TurnedTile(row, end, width, at.n, at.shared_weights)

    def rows_of(self, first: Int32, length: Int32, at) -> tuple:
        return first + at.row, first + at.end

    @cute.jit
    def gather_stage(self, mX, rRows, k, sTile, thread, rows: Int32, at):
        """Starts the copies of a stage's rows, pass by pass as far as the tile is wide."""
        at_once = gather.rows_per_pass(self.producer_warps)
        for p in cutlass.range_constexpr(cute.size(rRows)):
            if p * at_once < at.width:
                gather.gather_rows(mX, rRows, k, sTile, thread, self.gemm.k, at_once, p, 1)

    # ----------------------------------------------------- device: consumers

    def weights_of(self, sB: cute.Tensor, group: Int32) -> cute.Tensor:
        """A warpgroup's 64 of the 128 columns of each half."""
        return cute.make_tensor(sB.iterator + group * self.group_elements, self.weights_layout())

    def weights_layout(self) -> cute.Layout:
        """64 columns of each half, of 128; the pointer swizzles."""
        half, swizzled = TILE_M * TILE_K, SWIZZLED_ROWS * TILE_K
        columns = (SWIZZLED_ROWS, (BLOCK // SWIZZLED_ROWS, self.blocks))
        return cute.make_layout(
            (columns, (TILE_K, 1), (1, self.tile.stages)),
            stride=((TILE_K, (swizzled, half)), (1, 0), (0, self.blocks * half)),
        )

    @cute.jit
    def store_tile(self, epilogue, memory, rAcc, output, width: cutlass.Constexpr):
        """Stores the halves of H and A, chunk after chunk."""
        gemm, halves, rows = self.gemm, self.gemm.halves, self.tile.epi_n
        gH = expert_rows(epilogue.h.mTensor, output.first, output.length, output.row)
        gA = expert_rows(epilogue.a.mTensor, output.first, output.length, output.row)
        sChunk, gH = self.partition_boxes(epilogue.h, memory.sStore, gH, (None, None, None))
        _, gA = self.partition_boxes(epilogue.a, memory.sStore, gA, (None, None))
        column = output.n * (TILE_M // BLOCK) + memory.group
        for chunk in cutlass.range_constexpr(-(-width // rows)):
            buffer = self.store_buffer(memory, 0, 0)
            left = min(rows, width - chunk * rows)
            begins = [(half * width + chunk * rows) // 2 for half in range(halves)]
            self.wait_for_buffers(memory)
            for half in cutlass.range_constexpr(halves):
                stored = partial(sum_at, rAcc, begins[half])
                self.write_chunk(memory, buffer + half, left, stored)
            activated = partial(activated_at, gemm.activation, rAcc, begins)
            self.write_chunk(memory, buffer + halves, left, activated)
            self.publish(memory)
            if memory.is_issuer:
                for half in cutlass.range_constexpr(halves):
                    target = gH[None, chunk, column, half]
                    cute.copy(epilogue.h.atom, sChunk[None, buffer + half], target)
                cute.copy(epilogue.a.atom, sChunk[None, buffer + halves], gA[None, chunk, column])
                cute.arch.cp_async_bulk_commit_group()
