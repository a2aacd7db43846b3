"""The plain epilogue: the accumulators rounded once and stored, clipped at the expert's end.

Legend: R rows of all experts, N columns of the result.
"""

import cutlass
import cutlass.cute as cute

from sonicmoe_kernels.cute.grouped_gemm_m import GroupedGemmM
from sonicmoe_kernels.cute.tma_ragged import expert_rows, ragged_view
from sonicmoe_kernels.tiles import WARPGROUP_ROWS


class PlainStore(GroupedGemmM):
    """Base of the kernels that store C (R, N) as it is."""

    def plain_store_map(self, mC_RN: cute.Tensor):
        """Ragged store map of C."""
        n = self.gemm.n
        return self.store_map(ragged_view(mC_RN.iterator, (n,), (1,), n))

    @cute.jit
    def run_epilogue(self, epilogue, registers, memory, chunk_mma, rAcc, output, tiles_done):
        """Stores one chunk of epi_n columns after the other."""
        gemm = self.gemm
        copy, sTo, _, _ = self.chunk_copies(chunk_mma, memory)
        rChunk = self.make_chunk(chunk_mma)
        tChunk = copy.get_slice(memory.thread).retile(rChunk)
        for block in cutlass.range_constexpr(self.row_blocks):
            row = output.row + block * WARPGROUP_ROWS
            gRows = expert_rows(epilogue.mTensor, output.first, output.length, row)
            sBox, gBox = self.partition_boxes(epilogue, memory.sStore, gRows, (0, None))
            for chunk in cutlass.range_constexpr(gemm.epi_chunks):
                store_set = (block * gemm.epi_chunks + chunk) % self.tile.epi_sets
                buffer = self.store_buffer(memory, store_set, 0)
                for i in cutlass.range_constexpr(cute.size(rChunk)):
                    rChunk[i] = rAcc[self.acc_index(block, 0, chunk) + i].to(self.dtype)
                self.wait_for_buffers(memory)
                cute.copy(copy, tChunk, sTo[None, None, None, buffer])
                self.publish(memory)
                if memory.is_issuer:
                    column = output.n * gemm.epi_chunks + chunk
                    cute.copy(epilogue.atom, sBox[None, buffer], gBox[None, column])
                    cute.arch.cp_async_bulk_commit_group()
