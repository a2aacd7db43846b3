"""Kernel 4, dH, with the deferred schedule: dA' is rounded to 16 bits before it is used.

Legend: see d_hidden.py. In fp16 dA' could overflow before its score has scaled it; bf16 has room.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from sonicmoe_kernels.cute.d_hidden import DHidden
from sonicmoe_kernels.cute.deferred import Deferred
from sonicmoe_kernels.cute.tma_ragged import expert_rows


class DHiddenDeferred(Deferred, DHidden):
    """DHidden's loads and stores, Deferred's main loop."""

    @cute.jit
    def before_epilogue(self, epilogue, registers, memory, output):
        """Starts the first loads of H, reads the scores, and begins the sums of dS."""
        DHidden.before_main_loop(self, epilogue, registers, memory, output)
        registers[1].fill(0.0)

    @cute.jit
    def finish_chunk(
        self,
        tensors,
        registers,
        memory,
        chunk_mma,
        rHeld: list,
        held,
        chunk: cutlass.Constexpr,
        tiles_held,
    ):
        """Reads a chunk of H, stores that of dH and A'; after the last one dS."""
        if held.row < held.length:
            gemm, halves, load_sets = self.gemm, self.gemm.halves, self.tile.load_sets
            rScore, rSum = registers
            store, sTo, load, sFrom = self.chunk_copies(chunk_mma, memory)
            rIn = [self.make_chunk(chunk_mma) for _ in range(halves)]
            rOut = [self.make_chunk(chunk_mma) for _ in range(gemm.stores)]
            tIn = [load.get_slice(memory.thread).retile(r) for r in rIn]
            tOut = [store.get_slice(memory.thread).retile(r) for r in rOut]
            load_set, store_set = chunk % load_sets, chunk % self.tile.epi_sets
            fills = (tiles_held - 1) * (self.chunks // load_sets) + chunk // load_sets
            cute.arch.mbarrier_wait(self.load_barrier(memory, load_set), fills % 2)
            for half in cutlass.range_constexpr(halves):
                at = self.load_buffer(memory, load_set, half)
                cute.copy(load, sFrom[None, None, None, at], tIn[half])
            self.wait_for_buffers(memory)  # and everybody has read its part of H
            if const_expr(chunk + load_sets < self.chunks):
                self.load_h(tensors, memory, held, chunk + load_sets)
            da_primes = [rHeld[0][i].to(Float32) for i in range(cute.size(rOut[0]))]
            self.differentiate_chunk(da_primes, rIn, rOut, rScore, rSum, 0)
            buffer = self.store_buffer(memory, store_set, 0)
            for which in cutlass.range_constexpr(gemm.stores):
                cute.copy(store, tOut[which], sTo[None, None, None, buffer + which])
            self.publish(memory)
            if memory.is_issuer:
                gDH = expert_rows(tensors.dh.mTensor, held.first, held.length, held.row)
                gA = expert_rows(tensors.a.mTensor, held.first, held.length, held.row)
                sBox, gDH = self.partition_output(tensors.dh, memory.sStore, gDH, (0, None, None))
                _, gA = self.partition_output(tensors.a, memory.sStore, gA, (0, None))
                column = held.n * gemm.epi_chunks + chunk
                for half in cutlass.range_constexpr(halves):
                    target = gDH[None, column, half]
                    cute.copy(tensors.dh.atom, sBox[None, buffer + half], target)
                cute.copy(tensors.a.atom, sBox[None, buffer + halves], gA[None, column])
                cute.arch.cp_async_bulk_commit_group()
            if const_expr(chunk + 1 == gemm.epi_chunks):
                self.store_dscore(tensors, rSum, memory, held)
