"""Turned tiles: an expert's rows lie along N of the product, its weights along M.

Legend: R rows of all experts; a tile is up to tile_n rows by 128 columns of the result, its width
its rows rounded up (RowGemm.widths); block: 64 columns of a weight, a wgmma; chunk: epi_n rows by
64 columns, a store.

wgmma takes M by 64 and N by 8. With rows along M an expert of 530 rows has four tiles of 128 and
one of 18, which takes as long as the others: it brings weights that it shares with nobody, and its
products are padded to 64 rows. With rows along N it has three tiles of 184.

How wide a tile is is known on the device only, so every width has code of its own, main loop and
epilogue: what the widths shared, registers of sums above all, would be moved where their paths
meet. The sums are transposed on their way to shared memory. MMA's A are the weights, its B is A.
"""

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warp
from cutlass.tensor_utils import LayoutEnum

from sonicmoe_kernels.cute.grouped_gemm_m import GroupedGemmM
from sonicmoe_kernels.tiles import TILE_K, TILE_M, WARPGROUP_ROWS, RowGemm

BLOCK = WARPGROUP_ROWS
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


def sum_at(rAcc: cute.Tensor, begin: int, i: int) -> Float32:
    """A thread's i-th sum from `begin` on."""
    return rAcc[begin + i]


class TurnedOutput(NamedTuple):
    """Where a tile lies: rows [row, length) of the expert that begins at `first`."""

    first: Int32
    length: Int32
    row: Int32
    n: Int32
    width: Int32


class Turned(GroupedGemmM):
    """What kernels with turned tiles do otherwise.

    A subclass says what a warpgroup multiplies (`blocks` of 64, `weights_of`) and how its sums are
    stored (`store_tile`).
    """

    blocks: int

    def __init__(self, gemm: RowGemm):
        super().__init__(gemm)
        self.widths = gemm.widths
        self.chunk = (gemm.tile.epi_n, BLOCK)

    # ------------------------------------------------------------------ host

    def make_operand_layouts(self):
        super().make_operand_layouts()
        self.a_layout = self.rows_layout_staged(self.tile.tile_n, self.tile.stages)

    def rows_layout_staged(self, rows: int, stages: int) -> cute.ComposedLayout:
        """Shared layout of `rows` of A, as MMA's B."""
        shape = (TILE_M, rows, TILE_K)
        return sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, shape, self.dtype, stages)

    # ----------------------------------------------------- device: consumers

    def tile_operands(self, tiled_mma, chunk_mma, memory, sA, sB) -> tuple:
        """The rows, and the weights that a warpgroup multiplies: (64 * blocks, K, stages)."""
        return sA, self.weights_of(sB, memory.group)

    def output_tile(self, first: Int32, length: Int32, at, memory) -> TurnedOutput:
        return TurnedOutput(first, at.end, at.row, at.n, at.width)

    @cute.jit
    def compute_tile(self, stages, read, release, operands, epilogue, memory, output, tiles_done):
        """Main loop and epilogue of the tile's width; (read, release) behind it."""
        for i in cutlass.range_constexpr(len(self.widths)):
            if output.width == self.widths[i]:
                own = self.operands_of(self.widths[i], *operands)
                read, release = self.main_loop(stages, read, release, own, memory)
                self.store_tile(epilogue, memory, own[1], output, self.widths[i])
        return read, release

    def operands_of(self, width: int, sA: cute.Tensor, sWeights: cute.Tensor) -> tuple:
        """Operands of the main loop of a width, with sums of its own."""
        mma = self.mma_of(width)
        thread_mma = mma.get_slice(0)
        sRows = cute.make_tensor(sA.iterator, self.rows_layout(width))
        shape = mma.partition_shape_C((self.blocks * BLOCK, width))
        rAcc = cute.make_rmem_tensor(shape, Float32)
        rA = mma.make_fragment_A(thread_mma.partition_A(sWeights))
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
    def write_chunk(
        self, memory, buffer: cutlass.Constexpr, rows: cutlass.Constexpr, value: Callable
    ):
        """Writes a chunk of `rows` to a buffer; `value(i)` is a thread's i-th of it.

        Where 8 rows are left, the 8 behind them are anything: they are clipped.
        """
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), self.dtype)
        sStore = cute.recast_ptr(memory.sStore.iterator, dtype=self.dtype)  # without the swizzle
        rValues = cute.make_rmem_tensor(VALUES, self.dtype)
        for row in cutlass.range_constexpr(0, rows, ROWS_AT_ONCE):
            for i in cutlass.range_constexpr(min(VALUES, (rows - row) // 2)):
                rValues[i] = value(row // 2 + i).to(self.dtype)
            offset = stored_at(memory.thread) + (buffer * self.tile.epi_n + row) * BLOCK
            target = cute.make_tensor((sStore + offset).align(16), cute.make_layout(VALUES))
            cute.copy(atom, rValues, target)
