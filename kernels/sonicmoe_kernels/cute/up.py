"""Kernel 1, up: H = X[idx] [W1; W3]^T and A = act(H) for every expert's rows.

Legend: T tokens, D model width, F expert width, E experts, R routed rows, halves 2 when gated.

Gathers X's rows in the load. The B tile is N / 2 rows of W1 over N / 2 rows of W3, so gate and up
of a column meet in one thread's accumulators. Reads R D (X, mostly from L2), E F D per weight;
writes H (R, halves, F) and A (R, F). FLOPs: 2 R D F halves.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Int32, const_expr

from sonicmoe_kernels.cute.epilogues import activate
from sonicmoe_kernels.cute.grouped_gemm_m import Gathered, GroupedGemmM, TmaMap
from sonicmoe_kernels.cute.tma_ragged import expert_rows, ragged_view
from sonicmoe_kernels.tiles import WARPGROUP_ROWS, RowGemm


class UpStores(NamedTuple):
    """Ragged store maps of H (R, F, halves) and A (R, F)."""

    h: TmaMap
    a: TmaMap


class Up(GroupedGemmM):
    """Three stores per chunk of columns behind one pair of barriers: gate, up, A."""

    def __init__(self, gemm: RowGemm):
        super().__init__(gemm, weights_are_n_major=False)

    @cute.jit
    def __call__(
        self,
        mCounter: cute.Tensor | None,
        mX_TD: cute.Tensor,
        mIndex_R: cute.Tensor,
        mOffsets: cute.Tensor,
        mW1_EFD: cute.Tensor,
        mW3_EFD: cute.Tensor | None,
        mH_RHF: cute.Tensor,
        mA_RF: cute.Tensor,
        num_ctas: Int32,
        stream: CUstream,
    ):
        self.make_layouts()
        f, halves = self.gemm.f, self.gemm.halves
        weights = (self.weight_maps(mW1_EFD),)
        if const_expr(mW3_EFD is not None):
            weights = (*weights, self.weight_maps(mW3_EFD))
        stores = UpStores(
            self.store_map(ragged_view(mH_RHF.iterator, (f, halves), (1, f), halves * f)),
            self.store_map(ragged_view(mA_RF.iterator, (f,), (1,), f)),
        )
        gathered = Gathered(mX_TD, mIndex_R)
        self.launch(mOffsets, gathered, weights, stores, num_ctas, stream, mCounter)

    @cute.jit
    def run_epilogue(self, epilogue, registers, memory, chunk_mma, rAcc, output, tiles_done):
        """Stores the halves of H and A, one chunk of epi_n columns after the other."""
        gemm, halves = self.gemm, self.gemm.halves
        copy, sTo, _, _ = self.chunk_copies(chunk_mma, memory)
        rChunk = self.make_chunk(chunk_mma)
        tChunk = copy.get_slice(memory.thread).retile(rChunk)
        for block in cutlass.range_constexpr(self.row_blocks):
            row = output.row + block * WARPGROUP_ROWS
            gH = expert_rows(epilogue.h.mTensor, output.first, output.length, row)
            gA = expert_rows(epilogue.a.mTensor, output.first, output.length, row)
            sBox, gH = self.partition_boxes(epilogue.h, memory.sStore, gH, (0, None, None))
            _, gA = self.partition_boxes(epilogue.a, memory.sStore, gA, (0, None))
            for chunk in cutlass.range_constexpr(gemm.epi_chunks):
                store_set = (block * gemm.epi_chunks + chunk) % self.tile.epi_sets
                buffer = self.store_buffer(memory, store_set, 0)
                column = output.n * gemm.epi_chunks + chunk
                self.wait_for_buffers(memory)
                for which in cutlass.range_constexpr(gemm.stores):
                    for i in cutlass.range_constexpr(cute.size(rChunk)):
                        at = [self.acc_index(block, s, chunk) + i for s in range(halves)]
                        if const_expr(which < halves):
                            rChunk[i] = rAcc[at[which]].to(self.dtype)
                        else:
                            values = tuple(rAcc[j] for j in at)
                            rChunk[i] = activate(gemm.activation, values).to(self.dtype)
                    cute.copy(copy, tChunk, sTo[None, None, None, buffer + which])
                self.publish(memory)
                if memory.is_issuer:
                    for half in cutlass.range_constexpr(halves):
                        target = gH[None, column, half]
                        cute.copy(epilogue.h.atom, sBox[None, buffer + half], target)
                    cute.copy(epilogue.a.atom, sBox[None, buffer + halves], gA[None, column])
                    cute.arch.cp_async_bulk_commit_group()
