"""Kernel 4, dH: dA' = dO[idx] W2; dH = dact(s dA', H); A' = s A; dS = <dA', A> for every routed
row.

Legend: T tokens, D model width, F expert width, E experts, R routed rows, halves 2 when gated, s
the row's score.

Gathers dO's rows in the load; the epilogue reads H, recomputes A from it and never needs Y. dH may
be written over H: a chunk is read before it is stored, and nobody else reads it. dS is summed over
one n tile's columns in a fixed order and stored per n tile. Reads R D (dO, mostly from L2), E D F,
H and s; writes dH (R, halves, F), A' (R, F) and n_tiles R numbers. FLOPs: 2 R D F.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, const_expr

from sonicmoe_kernels.cute.epilogues import differentiate
from sonicmoe_kernels.cute.grouped_gemm_m import Gathered, GroupedGemmM, TmaMap
from sonicmoe_kernels.cute.tma_ragged import expert_rows, ragged_view
from sonicmoe_kernels.tiles import ELEMENT_BYTES, WARPGROUP_ROWS, RowGemm

ROWS_PER_THREAD = 2  # of a block of 64: rows lane / 4 and lane / 4 + 8 of the warp's 16


class DHiddenTensors(NamedTuple):
    """H's load map, the ragged store maps of dH and A', scores and the dS partials."""

    h: TmaMap
    dh: TmaMap
    a: TmaMap
    mScore: cute.Tensor
    mDScore: cute.Tensor


class DHidden(GroupedGemmM):
    """H arrives by TMA while the main loop runs; buffers are refilled as soon as they are read."""

    def __init__(self, gemm: RowGemm):
        super().__init__(gemm, weights_are_n_major=True)
        self.chunks = self.row_blocks * gemm.epi_chunks  # of a warpgroup's part of a tile

    @cute.jit
    def __call__(
        self,
        mCounter: cute.Tensor | None,
        mDO_TD: cute.Tensor,
        mIndex_R: cute.Tensor,
        mOffsets: cute.Tensor,
        mW2_EDF: cute.Tensor,
        mScore_R: cute.Tensor,
        mH_RHF: cute.Tensor,
        mDH_RHF: cute.Tensor,
        mA_RF: cute.Tensor,
        mDScore_NR: cute.Tensor,
        num_ctas: Int32,
        stream: CUstream,
    ):
        self.make_layouts()
        f, halves = self.gemm.f, self.gemm.halves
        h_rows = cute.make_layout((mH_RHF.shape[0], f, halves), stride=(halves * f, 1, f))
        tensors = DHiddenTensors(
            self.load_map(cute.make_tensor(mH_RHF.iterator, h_rows)),
            self.store_map(ragged_view(mDH_RHF.iterator, (f, halves), (1, f), halves * f)),
            self.store_map(ragged_view(mA_RF.iterator, (f,), (1,), f)),
            mScore_R,
            mDScore_NR,
        )
        weights = (self.weight_maps(mW2_EDF),)
        gathered = Gathered(mDO_TD, mIndex_R)
        self.launch(mOffsets, gathered, weights, tensors, num_ctas, stream, mCounter)

    def epilogue_registers(self) -> tuple:
        """(scores, sums of dS) of this thread's rows."""
        rows = self.row_blocks * ROWS_PER_THREAD
        return cute.make_rmem_tensor(rows, Float32), cute.make_rmem_tensor(rows, Float32)

    @cute.jit
    def thread_row(self, memory, output, i: cutlass.Constexpr) -> Int32:
        """The i-th row of this thread, counted from the expert's first."""
        block, eight = i // ROWS_PER_THREAD, i % ROWS_PER_THREAD
        warp, lane = memory.thread // 32, memory.thread % 32
        return output.row + block * WARPGROUP_ROWS + warp * 16 + eight * 8 + lane // 4

    @cute.jit
    def before_main_loop(self, tensors, registers, memory, output):
        """Starts the first loads of H and reads the scores, ahead of the products."""
        rScore, _ = registers
        for chunk in cutlass.range_constexpr(self.tile.load_sets):
            self.load_h(tensors, memory, output, chunk)
        for i in cutlass.range_constexpr(cute.size(rScore)):
            row = cutlass.min(self.thread_row(memory, output, i), output.length - 1)
            rScore[i] = tensors.mScore[output.first + row]

    @cute.jit
    def load_h(self, tensors, memory, output, chunk: cutlass.Constexpr):
        """Starts the loads of all halves of a chunk; rows past the expert's end are not used."""
        gemm = self.gemm
        load_set = chunk % self.tile.load_sets
        row = output.first + output.row + chunk // gemm.epi_chunks * WARPGROUP_ROWS
        column = output.n * gemm.epi_chunks + chunk % gemm.epi_chunks
        gRows = cute.domain_offset((row, 0, 0), tensors.h.mTensor)
        sBox, gBox = self.partition_boxes(tensors.h, memory.sLoad, gRows, (0, None, None))
        if memory.is_issuer:
            barrier = self.load_barrier(memory, load_set)
            with cute.arch.elect_one():
                chunk_bytes = WARPGROUP_ROWS * self.tile.epi_n * ELEMENT_BYTES
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, gemm.halves * chunk_bytes)
            for half in cutlass.range_constexpr(gemm.halves):
                buffer = self.load_buffer(memory, load_set, half)
                source, target = gBox[None, column, half], sBox[None, buffer]
                cute.copy(tensors.h.atom, source, target, tma_bar_ptr=barrier)

    def load_barrier(self, memory, load_set: int) -> cute.Pointer:
        """The barrier that says a warpgroup's load set is there."""
        return memory.barriers + memory.group * self.tile.load_sets + load_set

    @cute.jit
    def run_epilogue(self, tensors, registers, memory, chunk_mma, rAcc, output, tiles_done):
        """Reads H, stores dH and A', one chunk of epi_n columns after the other; then dS."""
        gemm, halves, load_sets = self.gemm, self.gemm.halves, self.tile.load_sets
        rScore, rSum = registers
        store, sTo, load, sFrom = self.chunk_copies(chunk_mma, memory)
        rIn = [self.make_chunk(chunk_mma) for _ in range(halves)]
        rOut = [self.make_chunk(chunk_mma) for _ in range(gemm.stores)]
        tIn = [load.get_slice(memory.thread).retile(r) for r in rIn]
        tOut = [store.get_slice(memory.thread).retile(r) for r in rOut]
        rSum.fill(0.0)
        for block in cutlass.range_constexpr(self.row_blocks):
            row = output.row + block * WARPGROUP_ROWS
            gDH = expert_rows(tensors.dh.mTensor, output.first, output.length, row)
            gA = expert_rows(tensors.a.mTensor, output.first, output.length, row)
            sBox, gDH = self.partition_boxes(tensors.dh, memory.sStore, gDH, (0, None, None))
            _, gA = self.partition_boxes(tensors.a, memory.sStore, gA, (0, None))
            for column_chunk in cutlass.range_constexpr(gemm.epi_chunks):
                chunk = block * gemm.epi_chunks + column_chunk
                load_set, store_set = chunk % load_sets, chunk % self.tile.epi_sets
                fills = tiles_done * (self.chunks // load_sets) + chunk // load_sets
                cute.arch.mbarrier_wait(self.load_barrier(memory, load_set), fills % 2)
                for half in cutlass.range_constexpr(halves):
                    at = self.load_buffer(memory, load_set, half)
                    cute.copy(load, sFrom[None, None, None, at], tIn[half])
                self.wait_for_buffers(memory)  # and everybody has read its part of H
                if const_expr(chunk + load_sets < self.chunks):
                    self.load_h(tensors, memory, output, chunk + load_sets)
                first = self.acc_index(block, 0, column_chunk)
                da_primes = [rAcc[first + i] for i in range(cute.size(rOut[0]))]
                self.differentiate_chunk(da_primes, rIn, rOut, rScore, rSum, block)
                buffer = self.store_buffer(memory, store_set, 0)
                for which in cutlass.range_constexpr(gemm.stores):
                    cute.copy(store, tOut[which], sTo[None, None, None, buffer + which])
                self.publish(memory)
                if memory.is_issuer:
                    column = output.n * gemm.epi_chunks + column_chunk
                    for half in cutlass.range_constexpr(halves):
                        target = gDH[None, column, half]
                        cute.copy(tensors.dh.atom, sBox[None, buffer + half], target)
                    cute.copy(tensors.a.atom, sBox[None, buffer + halves], gA[None, column])
                    cute.arch.cp_async_bulk_commit_group()
        self.store_dscore(tensors, rSum, memory, output)

    def differentiate_chunk(self, da_primes, rIn, rOut, rScore, rSum, block: int):
        """rOut = (dH's halves, A') from dA' and the halves rIn of H; adds <dA', A> to rSum."""
        for i, da_prime in enumerate(da_primes):
            own_row = block * ROWS_PER_THREAD + i // 2 % 2
            values = tuple(r[i].to(Float32) for r in rIn)
            score = rScore[own_row]
            gradients = differentiate(self.gemm.activation, values, score * da_prime)
            rSum[own_row] += da_prime * gradients.a
            for half, dh in enumerate(gradients.dh):
                rOut[half][i] = dh.to(self.dtype)
            rOut[-1][i] = (score * gradients.a).to(self.dtype)

    @cute.jit
    def store_dscore(self, tensors, rSum, memory, output):
        """Adds the four threads of a row in a fixed order and stores this n tile's part."""
        for i in cutlass.range_constexpr(cute.size(rSum)):
            total = rSum[i]
            total += cute.arch.shuffle_sync_bfly(total, 1)
            total += cute.arch.shuffle_sync_bfly(total, 2)
            row = self.thread_row(memory, output, i)
            if row < output.length and output.n < self.gemm.n_tiles and memory.thread % 4 == 0:
                tensors.mDScore[output.n, output.first + row] = total
