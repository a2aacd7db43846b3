"""What the consumers of both GEMM templates do with the k tiles of a ring of stages.

Legend: k tile = one stage of A and B; operands = (tiled mma, sums, fragments of A, of B).

Loops of the DSL carry local variables alone: a pipeline state that a method moves on is given back.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from sonicmoe_kernels.tiles import TILE_K

WARPGROUP = 128
K_BLOCKS = TILE_K // 16  # of a wgmma's depth, in a k tile


class MainLoop:
    """Base of kernels whose instances say whether an operand is gathered (`gathers`)."""

    gathers: bool

    def make_operands(self, tiled_mma, thread: Int32, shape: tuple, sA, sB) -> tuple:
        """The operands of a warpgroup that begins at `thread` of the MMA, for tiles of `shape`."""
        thread_mma = tiled_mma.get_slice(thread)
        rA = tiled_mma.make_fragment_A(thread_mma.partition_A(sA))
        rB = tiled_mma.make_fragment_B(thread_mma.partition_B(sB))
        rAcc = cute.make_rmem_tensor(tiled_mma.partition_shape_C(shape), Float32)
        return tiled_mma, rAcc, rA, rB

    def start_stage(self, ring, read, operands: tuple, accumulates: bool, blocks: int = K_BLOCKS):
        """Waits for a k tile and starts its products; the first of a tile overwrites the sums.

        blocks: of 16 along K, that are multiplied.
        """
        ring.consumer_wait(read)
        self.fence_gathered()
        self.multiply(*operands, read.index, accumulates, blocks)
        read.advance()
        return read

    def finish_stage(self, ring, release, running: int):
        """Waits until `running` k tiles are being multiplied; gives back the one before."""
        warpgroup.wait_group(running)
        ring.consumer_release(release)
        release.advance()
        return release

    @cute.jit
    def multiply_stages(self, ring, read, release, operands: tuple, first: Int32, end: Int32):
        """K tiles `first` to `end` of a tile that has begun; the last one stays in flight."""
        for _ in cutlass.range(first, end, unroll=1):
            read = self.start_stage(ring, read, operands, True)
            release = self.finish_stage(ring, release, 1)
        return read, release

    @cute.jit
    def multiply(
        self,
        tiled_mma,
        rAcc,
        rA,
        rB,
        stage,
        accumulates: cutlass.Constexpr,
        blocks: cutlass.Constexpr,
    ):
        """Issues the wgmmas of one stage."""
        warpgroup.fence()
        atom = cute.make_mma_atom(tiled_mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, accumulates)
        for block in cutlass.range_constexpr(blocks):
            cute.gemm(atom, rAcc, rA[None, None, block, stage], rB[None, None, block, stage], rAcc)
            atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    @cute.jit
    def fence_gathered(self):
        """cp.async writes through the generic proxy, wgmma reads through the async one."""
        if const_expr(self.gathers):
            cute.arch.fence_proxy("async.shared", space="cta")
