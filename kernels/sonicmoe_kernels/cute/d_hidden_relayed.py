"""Kernel 4, dH, with the relayed schedule: dH replaces H and A' replaces dA' in shared memory.

Legend: F expert width, halves 2 when gated; block, slice, chunk, unit, place as in `relayed`.

Mathematics, bytes and FLOPs as in `d_hidden`; dA' is rounded once when it is handed over. A load
set is a place in a chunk for every half: it holds a unit of H while that is loaded, turned into dH
and stored. Three units are on their way while one is worked on.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from sonicmoe_kernels.cute.d_hidden import ROWS_PER_THREAD, DHidden
from sonicmoe_kernels.cute.grouped_gemm_m import OutputTile
from sonicmoe_kernels.cute.relayed import SLICE_ROWS, Relayed
from sonicmoe_kernels.cute.tma_ragged import expert_rows
from sonicmoe_kernels.tiles import ELEMENT_BYTES, SLICES

AHEAD = SLICES - 1  # units of H on their way


class DHiddenRelayed(Relayed, DHidden):
    """Unit by unit: H from a set, dA' from where it was handed over, both stored in place."""

    def warp_registers(self) -> tuple:
        """(scores, sums of dS, the next slice's scores) of a lane's two rows."""
        return tuple(cute.make_rmem_tensor(ROWS_PER_THREAD, Float32) for _ in range(3))

    @cute.jit
    def before_block(self, tensors, registers, memory, output):
        """Starts the loads of the block's first units and scores."""
        for chunk in cutlass.range_constexpr(AHEAD):
            self.load_unit(tensors, memory, output, chunk)
        self.load_scores(tensors, registers[0], memory, output)

    @cute.jit
    def load_unit(self, tensors, memory, output, chunk: cutlass.Constexpr):
        """Starts the loads of all halves of a unit; rows past the expert's end are not used."""
        gemm, place = self.gemm, chunk % SLICES
        gRows = cute.domain_offset((output.first + output.row, 0, 0), tensors.h.mTensor)
        sBox, gBox = self.partition_slices(tensors.h, memory.sLoad, gRows, (0, None, None))
        barrier = self.load_barrier(memory, place)
        with cute.arch.elect_one():
            unit_bytes = SLICE_ROWS * self.tile.epi_n * ELEMENT_BYTES
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, gemm.halves * unit_bytes)
        for half in cutlass.range_constexpr(gemm.halves):
            at = self.h_chunk(memory, half) * SLICES + place
            column = output.n * gemm.epi_chunks + chunk
            source, target = gBox[None, column, half], sBox[None, at]
            cute.copy(tensors.h.atom, source, target, tma_bar_ptr=barrier)

    def h_chunk(self, memory, half: int):
        """Index among the load buffers of the block's chunk for a half of H."""
        return memory.group * self.gemm.halves + half

    @cute.jit
    def load_scores(self, tensors, rScore, memory, output):
        for j in cutlass.range_constexpr(ROWS_PER_THREAD):
            row = cutlass.min(self.thread_row(memory, output, j), output.length - 1)
            rScore[j] = tensors.mScore[output.first + row]

    @cute.jit
    def finish_slice(
        self, tensors, registers, memory, chunk_mma, block_output, i, slices, slices_done
    ):
        gemm, halves = self.gemm, self.gemm.halves
        rScore, rSum, rNextScore = registers
        first, length, block_row, n = block_output
        output = OutputTile(first, length, block_row + i * SLICE_ROWS, n)
        below = OutputTile(first, length, output.row + SLICE_ROWS, n)
        self.load_scores(tensors, rNextScore, memory, below)
        rSum.fill(0.0)
        _, sTo, _, sFrom = self.slice_copies(chunk_mma, memory, memory.sStore, i)
        rIn = [self.make_chunk(chunk_mma) for _ in range(halves)]
        rDA = self.make_chunk(chunk_mma)
        rOut = [self.make_chunk(chunk_mma) for _ in range(gemm.stores)]
        gDH = expert_rows(tensors.dh.mTensor, first, length, output.row)
        gA = expert_rows(tensors.a.mTensor, first, length, output.row)
        sSets, gDH = self.partition_slices(tensors.dh, memory.sLoad, gDH, (0, None, None))
        sBox, gA = self.partition_slices(tensors.a, memory.sStore, gA, (0, None))
        for chunk in cutlass.range_constexpr(gemm.epi_chunks):
            place, at = chunk % SLICES, self.handed_chunk(memory, chunk)
            fills = slices_done * (gemm.epi_chunks // SLICES) + chunk // SLICES
            store, sDH, load, sH = self.slice_copies(chunk_mma, memory, memory.sLoad, place)
            from_shared, to_shared = load.get_slice(memory.thread), store.get_slice(memory.thread)
            cute.copy(load, sFrom[None, None, None, at], from_shared.retile(rDA))
            cute.arch.mbarrier_wait(self.load_barrier(memory, place), fills % 2)
            for half in cutlass.range_constexpr(halves):
                buffer = self.h_chunk(memory, half)
                cute.copy(load, sH[None, None, None, buffer], from_shared.retile(rIn[half]))
            da_primes = [rDA[j].to(Float32) for j in range(cute.size(rDA))]
            self.differentiate_chunk(da_primes, rIn, rOut, rScore, rSum, 0)
            cute.arch.sync_warp()  # every lane has read what is overwritten now
            for half in cutlass.range_constexpr(halves):
                buffer = self.h_chunk(memory, half)
                cute.copy(store, to_shared.retile(rOut[half]), sDH[None, None, None, buffer])
            cute.copy(store, to_shared.retile(rOut[halves]), sTo[None, None, None, at])
            self.publish_slice()
            column = n * gemm.epi_chunks + chunk
            for half in cutlass.range_constexpr(halves):
                buffer = self.h_chunk(memory, half) * SLICES + place
                cute.copy(tensors.dh.atom, sSets[None, buffer], gDH[None, column, half])
            cute.copy(tensors.a.atom, sBox[None, at * SLICES + i], gA[None, column])
            cute.arch.cp_async_bulk_commit_group()
            # The unit before this one leaves its set to the unit that comes AHEAD of this one.
            cute.arch.cp_async_bulk_wait_group(1, read=True)
            if const_expr(chunk + AHEAD < gemm.epi_chunks):
                self.load_unit(tensors, memory, output, chunk + AHEAD)
            else:
                if i + 1 < slices:
                    self.load_unit(tensors, memory, below, chunk + AHEAD - gemm.epi_chunks)
        self.store_dscore(tensors, rSum, memory, output)
        for j in cutlass.range_constexpr(ROWS_PER_THREAD):
            rScore[j] = rNextScore[j]
