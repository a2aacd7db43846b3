"""The weight gradients with deferred stores: a tile is stored under the products of the next one.

In the plain kernel the tensor cores rest while a tile is stored: what 1.2 k tiles take, of 8.5 with
512 rows an expert. Here a consumer rounds its sums to 16 bits, which frees their registers at once,
and goes on to the next tile; between the first products of that one it stores a slab of the last.

Registers of a thread: 128 sums, 64 held, a few for addresses, of 224.
"""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from sonicmoe_kernels.cute.epilogues import round_pair
from sonicmoe_kernels.cute.grouped_gemm_k import (
    BLOCKS,
    ROWS,
    SLAB,
    GroupedGemmK,
    Walk,
    blocks_of_last,
)
from sonicmoe_kernels.tiles import TILE_K


class DeferredGemmK(GroupedGemmK):
    """See the module's text; everything but the consumers is GroupedGemmK's."""

    @cute.jit
    def k_tiles(self, rows: Int32) -> Int32:
        """Not fewer than slabs: those behind the expert's end multiply zeros, which nobody loads.

        A product that is made on one of two ways only makes the compiler wait for every one.
        """
        return cutlass.max((rows + (TILE_K - 1)) // TILE_K, self.tile_n // SLAB)

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
        tCrG, tCrS, rSum = self.make_fragments(mma, sG, sS, consumer)
        out = self.make_slab_store(mma_slab, stores, sOut, consumer)
        slabs = self.tile_n // SLAB
        slab_shape = mma_slab.partition_shape_C((ROWS, SLAB))
        rHeld = [cute.make_rmem_tensor(slab_shape, self.dtype) for _ in range(slabs)]
        tRrHeld = [out.thread_copy.retile(rSlab) for rSlab in rHeld]
        for rSlab in rHeld:
            rSlab.fill(0)

        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        release = state.clone()
        wave, carried = Int32(0), self.before_first_wave()
        work = self.next_work(walk, wave, carried)
        held = work._replace(m=Int32(self.D))  # beyond all rows: nothing is stored
        while work.unit < walk.units:
            wave += 1
            k_tiles = self.k_tiles(work.rows)
            for c in cutlass.range_constexpr(slabs):
                ring.consumer_wait(state)
                cute.arch.fence_proxy("async.shared", space="cta")
                self.multiply(mma, rSum, tCrG, tCrS, state.index, c == 0)
                state.advance()
                self.put_slab(out, tRrHeld[c], held, c)
                if const_expr(c > 0):
                    warpgroup.wait_group(1)
                    ring.consumer_release(release)
                    release.advance()
            next_work = self.next_work(walk, wave, carried)
            for _ in cutlass.range(slabs, k_tiles - int(self.short_end), unroll=1):
                ring.consumer_wait(state)
                cute.arch.fence_proxy("async.shared", space="cta")
                self.multiply(mma, rSum, tCrG, tCrS, state.index, False)
                warpgroup.wait_group(1)
                ring.consumer_release(release)
                release.advance()
                state.advance()
            if const_expr(self.short_end):  # noqa: SIM102
                if k_tiles > slabs:
                    ring.consumer_wait(state)
                    cute.arch.fence_proxy("async.shared", space="cta")
                    blocks = blocks_of_last(work.rows)
                    for count in cutlass.range_constexpr(1, BLOCKS + 1):
                        if blocks == count:
                            self.multiply(mma, rSum, tCrG, tCrS, state.index, False, count)
                    warpgroup.wait_group(1)
                    ring.consumer_release(release)
                    release.advance()
                    state.advance()
            warpgroup.wait_group(0)
            ring.consumer_release(release)
            release.advance()
            for c in cutlass.range_constexpr(slabs):
                rWords = cute.recast_tensor(rHeld[c], Int32)
                for i in cutlass.range_constexpr(cute.size(rWords)):
                    first = (c * cute.size(rWords) + i) * 2
                    rWords[i] = round_pair(rSum[first], rSum[first + 1], self.dtype)
            held = work
            work = next_work
        for c in cutlass.range_constexpr(slabs):
            self.put_slab(out, tRrHeld[c], held, c)
        if out.is_issuer:
            cute.arch.cp_async_bulk_wait_group(0, read=False)
