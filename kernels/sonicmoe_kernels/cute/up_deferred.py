"""Kernel 1, up, with the deferred schedule: A is made from the rounded H, which backward reads too.

Legend: see up.py.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from sonicmoe_kernels.cute.deferred import Deferred
from sonicmoe_kernels.cute.epilogues import activate
from sonicmoe_kernels.cute.up import Up


class UpDeferred(Deferred, Up):
    """Up's loads and stores, Deferred's main loop."""

    @cute.jit
    def finish_chunk(
        self,
        epilogue,
        registers,
        memory,
        chunk_mma,
        rHeld: list,
        held,
        chunk: cutlass.Constexpr,
        tiles_held,
    ):
        """Stores the halves of H of a held chunk, and A; nothing of a tile of no rows."""
        gemm, halves = self.gemm, self.gemm.halves
        copy, sTo, _, _ = self.chunk_copies(chunk_mma, memory)
        thread_copy = copy.get_slice(memory.thread)
        rA = self.make_chunk(chunk_mma)
        buffer = self.store_buffer(memory, chunk % self.tile.epi_sets, 0)
        self.wait_for_buffers(memory)
        for half in cutlass.range_constexpr(halves):
            tHalf = thread_copy.retile(rHeld[half])
            cute.copy(copy, tHalf, sTo[None, None, None, buffer + half])
        for i in cutlass.range_constexpr(cute.size(rA)):
            values = tuple(rHalf[i].to(Float32) for rHalf in rHeld)
            rA[i] = activate(gemm.activation, values).to(self.dtype)
        cute.copy(copy, thread_copy.retile(rA), sTo[None, None, None, buffer + halves])
        self.publish(memory)
        if memory.is_issuer and held.row < held.length:
            self.store_chunk(epilogue.h, epilogue.a, memory, held, chunk, buffer)
