"""Kernel 4, dH, with the deferred schedule: dA' is rounded to 16 bits before it is used.

Legend: see d_hidden.py. In fp16 dA' could overflow before its score has scaled it; bf16 has room.
"""

import cutlass
import cutlass.cute as cute
from cutlass import const_expr

from sonicmoe_kernels.cute.d_hidden import DHidden
from sonicmoe_kernels.cute.deferred import Deferred


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
            fragments = self.make_fragments(chunk_mma, memory)
            tiles_done = tiles_held - 1
            buffer = self.put_chunk(
                tensors, registers, memory, fragments, rHeld[0], 0, held, chunk, tiles_done
            )
            if memory.is_issuer:
                self.store_chunk(tensors.dh, tensors.a, memory, held, chunk, buffer)
            if const_expr(chunk + 1 == self.gemm.epi_chunks):
                self.store_dscore(tensors, registers[1], memory, held)
