"""The deferred schedule of a ragged-M kernel: an epilogue that runs under the next tile's products.

Cooperative tiles stop the tensor cores for as long as their epilogue takes, which is much where the
inner dimension is short. Here a warpgroup rounds its sums to 16 bits at a tile's end, which frees
their registers at once, and goes on to the next tile; between the first products of that one it
finishes a chunk of the held tile each. No shared memory is needed for it, and nobody waits.

Registers of a thread: 128 sums, 64 held words, what a chunk takes, and addresses, of 224 together.
A product is made on every way through the main loop: where one in flight meets a branch that had
none, the compiler waits for each of them.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, pipeline
from cutlass.cute.nvgpu import warpgroup

from sonicmoe_kernels.cute.epilogues import round_pair
from sonicmoe_kernels.cute.grouped_gemm_m import WARPGROUP, GroupedGemmM, OutputTile, TmaMap
from sonicmoe_kernels.cute.tma_ragged import expert_rows
from sonicmoe_kernels.tiles import TILE_M, WARPGROUP_ROWS


class Deferred(GroupedGemmM):
    """Base of kernels with this schedule: a subclass says how a held chunk is finished."""

    def before_epilogue(self, epilogue, registers, memory, output):
        """What a tile's epilogue wants started ahead of its sums; nothing by default.

        Called in its main loop, when the tile before is finished.
        """

    def finish_chunk(
        self, epilogue, registers, memory, chunk_mma, rHeld, held, chunk: int, tiles_held
    ):
        """Stores a chunk of columns of the held tile, the `tiles_held`-th of this warpgroup.

        rHeld: for each source stacked along N, the chunk's sums in 16 bits.
        """
        raise NotImplementedError

    @cute.jit
    def consume(self, stages, walk, tiled_mma, chunk_mma, epilogue, memory, sA, sB):
        """Multiplies all tiles of this warpgroup; stores each during the next one or at the end."""
        gemm = self.gemm
        thread_mma = tiled_mma.get_slice(memory.group * WARPGROUP)
        rA = tiled_mma.make_fragment_A(thread_mma.partition_A(sA))
        rB = tiled_mma.make_fragment_B(thread_mma.partition_B(sB))
        shape = tiled_mma.partition_shape_C((TILE_M, self.tile.tile_n))
        rAcc = cute.make_rmem_tensor(shape, Float32)
        rHeld = [
            [self.make_chunk(chunk_mma) for _ in range(gemm.n_sources)]
            for _ in range(gemm.epi_chunks)
        ]
        for sources in rHeld:
            for rSource in sources:
                rSource.fill(0)
        registers = self.epilogue_registers()
        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.tile.stages)
        release = read.clone()
        expert = Int32(0)
        unit = walk.cluster
        total = walk.sStart[gemm.num_experts]
        # Of no rows: nothing is held yet. A tile stays held while blocks without rows pass by.
        held, tiles_held = OutputTile(Int32(0), Int32(0), Int32(0), Int32(0)), Int32(0)
        while unit < total:
            expert, first, length, at = self.locate(walk, unit, expert)
            row = at.m * TILE_M + memory.group * WARPGROUP_ROWS
            if row < length:
                for chunk in cutlass.range_constexpr(gemm.epi_chunks):
                    stages.consumer_wait(read)
                    self.fence_gathered()
                    self.multiply(tiled_mma, rAcc, rA, rB, read.index, chunk > 0)
                    read.advance()
                    self.finish_chunk(
                        epilogue,
                        registers,
                        memory,
                        chunk_mma,
                        rHeld[chunk],
                        held,
                        chunk,
                        tiles_held,
                    )
                    if const_expr(chunk > 0):
                        warpgroup.wait_group(1)
                        stages.consumer_release(release)
                        release.advance()
                held = OutputTile(first, length, row, at.n)
                tiles_held += 1
                self.before_epilogue(epilogue, registers, memory, held)
                for _k in cutlass.range(gemm.epi_chunks, self.k_tiles, unroll=1):
                    stages.consumer_wait(read)
                    self.fence_gathered()
                    self.multiply(tiled_mma, rAcc, rA, rB, read.index, True)
                    warpgroup.wait_group(1)
                    stages.consumer_release(release)
                    release.advance()
                    read.advance()
                warpgroup.wait_group(0)
                stages.consumer_release(release)
                release.advance()
                for chunk in cutlass.range_constexpr(gemm.epi_chunks):
                    self.round_chunk(rAcc, rHeld[chunk], chunk)
            else:
                # No row of this block of 64 belongs to the expert: let the stages pass by.
                for _k in cutlass.range(self.k_tiles, unroll=1):
                    stages.consumer_wait(read)
                    stages.consumer_release(release)
                    release.advance()
                    read.advance()
            unit += walk.clusters
        for chunk in cutlass.range_constexpr(gemm.epi_chunks):
            self.finish_chunk(
                epilogue, registers, memory, chunk_mma, rHeld[chunk], held, chunk, tiles_held
            )
        if memory.is_issuer:
            cute.arch.cp_async_bulk_wait_group(0, read=False)

    @cute.jit
    def store_chunk(self, h: TmaMap, a: TmaMap, memory, held, chunk: cutlass.Constexpr, buffer):
        """Starts the stores of a chunk's halves of H or dH, and of A, from `buffer` on."""
        halves = self.gemm.halves
        gH = expert_rows(h.mTensor, held.first, held.length, held.row)
        gA = expert_rows(a.mTensor, held.first, held.length, held.row)
        sBox, gH = self.partition_output(h, memory.sStore, gH, (0, None, None))
        _, gA = self.partition_output(a, memory.sStore, gA, (0, None))
        column = held.n * self.gemm.epi_chunks + chunk
        for half in cutlass.range_constexpr(halves):
            cute.copy(h.atom, sBox[None, buffer + half], gH[None, column, half])
        cute.copy(a.atom, sBox[None, buffer + halves], gA[None, column])
        cute.arch.cp_async_bulk_commit_group()

    def round_chunk(self, rAcc: cute.Tensor, rSources: list, chunk: int):
        """Rounds a chunk's sums, of each source, to the operands' type."""
        for source, rSource in enumerate(rSources):
            rWords = cute.recast_tensor(rSource, Int32)
            first = self.acc_index(0, source, chunk)
            for i in range(cute.size(rWords)):
                rWords[i] = round_pair(rAcc[first + 2 * i], rAcc[first + 2 * i + 1], self.dtype)
