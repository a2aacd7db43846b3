"""Kernel 1, up, with the relayed schedule: H is what the consumers hand over, A is made of it.

Legend: F expert width, halves 2 when gated; block, slice, chunk, place as in `relayed`.

Mathematics, bytes and FLOPs as in `up`; A is that of the rounded H, as the backward pass recomputes
it.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from sonicmoe_kernels.cute.epilogues import activate
from sonicmoe_kernels.cute.relayed import SLICE_ROWS, Relayed
from sonicmoe_kernels.cute.tma_ragged import expert_rows
from sonicmoe_kernels.cute.up import Up
from sonicmoe_kernels.tiles import SLICES


class UpRelayed(Relayed, Up):
    """H is stored from where it was handed over; A from a chunk of the warp's, place by place."""

    @cute.jit
    def finish_slice(self, epilogue, registers, memory, chunk_mma, output, i, slices, slices_done):
        gemm, halves = self.gemm, self.gemm.halves
        _, _, load, sFrom = self.slice_copies(chunk_mma, memory, memory.sStore, i)
        rIn = [self.make_chunk(chunk_mma) for _ in range(halves)]
        rOut = self.make_chunk(chunk_mma)
        row = output.row + i * SLICE_ROWS
        gH = expert_rows(epilogue.h.mTensor, output.first, output.length, row)
        gA = expert_rows(epilogue.a.mTensor, output.first, output.length, row)
        sBox, gH = self.partition_slices(epilogue.h, memory.sStore, gH, (0, None, None))
        _, gA = self.partition_slices(epilogue.a, memory.sStore, gA, (0, None))
        buffer = gemm.handed_chunks + memory.group
        for chunk in cutlass.range_constexpr(gemm.epi_chunks):
            column, place = output.n * gemm.epi_chunks + chunk, chunk % SLICES
            for half in cutlass.range_constexpr(halves):
                at = self.handed_chunk(memory, half, chunk)
                tIn = load.get_slice(memory.thread).retile(rIn[half])
                cute.copy(load, sFrom[None, None, None, at], tIn)
                cute.copy(epilogue.h.atom, sBox[None, at * SLICES + i], gH[None, column, half])
            for j in cutlass.range_constexpr(cute.size(rOut)):
                values = tuple(r[j].to(Float32) for r in rIn)
                rOut[j] = activate(gemm.activation, values).to(self.dtype)
            store, sTo, _, _ = self.slice_copies(chunk_mma, memory, memory.sStore, place)
            cute.arch.cp_async_bulk_wait_group(SLICES - 1, read=True)  # this place's last store
            cute.arch.sync_warp()
            tOut = store.get_slice(memory.thread).retile(rOut)
            cute.copy(store, tOut, sTo[None, None, None, buffer])
            self.publish_slice()
            cute.copy(epilogue.a.atom, sBox[None, buffer * SLICES + place], gA[None, column])
            cute.arch.cp_async_bulk_commit_group()
