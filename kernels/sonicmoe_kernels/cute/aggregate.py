"""Kernels 3 and 8: every token gathers the rows it owns and sums them in fp32.

    out_TD[t] = sum over rows r of token t of (score_R[r] *) y_RD[r]  (+ add_TD[t])

Kernel 3 (the layer's output) is weighted, kernel 8 (the input's gradient) is not. No atomics, and
a fixed order of additions (that of token_rows_R, then add_TD): results are bitwise repeatable.

Legend
    T tokens, D model width, R routed rows, K rows of one token
    R_max: bound on R; rows in [R, R_max) belong to no token and are never read
    chunk: 8 elements, 16 bytes: what one thread reads from each row
"""

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64, const_expr

from sonicmoe_kernels.tiles import Aggregation

CHUNK = 8  # elements of one load
CHUNK_BYTES = 16
THREADS = 256
ROWS_IN_FLIGHT = 8  # rows a thread asks for before it adds the first; 4, 8, 16: same time (H100)


class Aggregate:
    """Sum of each token's rows, one thread for each 16-byte chunk of the output.

    Reads R*D*2 bytes of y (+ T*D*2 of add), 4R of row ids (+ 4R of scores, 4T of offsets), writes
    T*D*2. FLOPs: 2RD. No shared memory, no warp roles; the T*D/8 threads are laid out flat, so
    every D that is a multiple of 8 fills whole warps. T*D/8 must stay below 2^31.

    spec.rows_per_token: K when token t owns exactly token_rows_R[t*K : (t+1)*K], None for a CSR
    over token_offsets.

    Measured on an H100 (2026-11-22), weighted, in one run with a copy of 3.01 TB/s: K = 8, D = 1536
    2.87 TB/s, D = 768 2.83; D = 4096 K = 4 3.00, K = 16 2.97; ragged 2.81 to 2.97.
    """

    def __init__(self, spec: Aggregation):
        if spec.d <= 0 or spec.d % CHUNK:
            raise ValueError(f"aggregation: D = {spec.d}, but D must be a multiple of {CHUNK}")
        if spec.rows_per_token is not None and spec.rows_per_token <= 0:
            raise ValueError(f"aggregation: rows_per_token = {spec.rows_per_token}, but at least 1")
        self.D = spec.d
        self.chunks = spec.d // CHUNK
        self.rows_per_token = spec.rows_per_token
        self.weighted = spec.weighted
        self.residual = spec.residual

    @cute.jit
    def __call__(
        self,
        mY_RD: cute.Tensor,
        mTokenRows_R: cute.Tensor,
        mTokenOffsets: cute.Tensor | None,
        mScore_R: cute.Tensor | None,
        mAdd_TD: cute.Tensor | None,
        mOut_TD: cute.Tensor,
        stream: CUstream,
    ):
        blocks = cute.ceil_div(mOut_TD.shape[0] * self.chunks, THREADS)
        self.kernel(mY_RD, mTokenRows_R, mTokenOffsets, mScore_R, mAdd_TD, mOut_TD).launch(
            grid=[cutlass.max(blocks, 1), 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mY_RD: cute.Tensor,
        mTokenRows_R: cute.Tensor,
        mTokenOffsets: cute.Tensor | None,
        mScore_R: cute.Tensor | None,
        mAdd_TD: cute.Tensor | None,
        mOut_TD: cute.Tensor,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        index = block * THREADS + thread
        token = index // self.chunks
        chunk = index - token * self.chunks
        if token < mOut_TD.shape[0]:
            rSum = cute.make_rmem_tensor(CHUNK, Float32)
            rSum.fill(0.0)
            rAdd = cute.make_rmem_tensor(CHUNK, mOut_TD.element_type)
            if const_expr(self.residual):
                self.load_chunk(mAdd_TD, token, chunk, rAdd)
            if const_expr(self.rows_per_token is not None):
                for start in cutlass.range_constexpr(0, self.rows_per_token, ROWS_IN_FLIGHT):
                    count = min(ROWS_IN_FLIGHT, self.rows_per_token - start)
                    first = token * self.rows_per_token + start
                    self.add_rows(mY_RD, mTokenRows_R, mScore_R, chunk, first, count, None, rSum)
            else:
                first = mTokenOffsets[token]
                end = mTokenOffsets[token + 1]
                while first < end:
                    count = ROWS_IN_FLIGHT
                    self.add_rows(mY_RD, mTokenRows_R, mScore_R, chunk, first, count, end, rSum)
                    first += ROWS_IN_FLIGHT
            if const_expr(self.residual):
                rSum.store(rSum.load() + rAdd.load().to(Float32))
            rOut = cute.make_rmem_tensor(CHUNK, mOut_TD.element_type)
            rOut.store(rSum.load().to(mOut_TD.element_type))
            self.copy_16_bytes(rOut, self.chunk_of(mOut_TD, token, chunk))

    @cute.jit
    def add_rows(
        self,
        mY_RD: cute.Tensor,
        mTokenRows_R: cute.Tensor,
        mScore_R: cute.Tensor | None,
        chunk: Int32,
        first: Int32,
        count: cutlass.Constexpr,
        end: Int32 | None,
        rSum: cute.Tensor,
    ):
        """Add rows mTokenRows_R[first : first + count], cut at `end`; all loads before all sums."""
        rY = cute.make_rmem_tensor((CHUNK, count), mY_RD.element_type)
        rScore = cute.make_rmem_tensor(count, Float32)
        if const_expr(end is not None):
            rY.fill(0.0)
            rScore.fill(0.0)
        for i in cutlass.range_constexpr(count):
            if const_expr(end is None):
                self.load_row(mY_RD, mTokenRows_R, mScore_R, chunk, first, i, rY, rScore)
            else:
                if first + i < end:
                    self.load_row(mY_RD, mTokenRows_R, mScore_R, chunk, first, i, rY, rScore)
        for i in cutlass.range_constexpr(count):
            row = rY[None, i].load().to(Float32)
            if const_expr(self.weighted):
                row = row * rScore[i]
            rSum.store(rSum.load() + row)

    @cute.jit
    def load_row(
        self,
        mY_RD: cute.Tensor,
        mTokenRows_R: cute.Tensor,
        mScore_R: cute.Tensor | None,
        chunk: Int32,
        first: Int32,
        i: cutlass.Constexpr,
        rY: cute.Tensor,
        rScore: cute.Tensor,
    ):
        row = mTokenRows_R[first + i]
        self.load_chunk(mY_RD, row, chunk, rY[None, i])
        if const_expr(self.weighted):
            rScore[i] = mScore_R[row]

    @cute.jit
    def load_chunk(self, mX: cute.Tensor, row: Int32, chunk: Int32, rX: cute.Tensor):
        self.copy_16_bytes(self.chunk_of(mX, row, chunk), rX)

    @cute.jit
    def chunk_of(self, mX: cute.Tensor, row: Int32, chunk: Int32):
        """16 bytes of one row; the product row * D needs 64 bits."""
        offset = cute.assume(Int64(row) * self.D + chunk * CHUNK, divby=CHUNK)
        return cute.make_tensor(mX.iterator + offset, cute.make_layout(CHUNK))

    @cute.jit
    def copy_16_bytes(self, source: cute.Tensor, target: cute.Tensor):
        atom = cute.make_copy_atom(
            cute.nvgpu.CopyUniversalOp(), source.element_type, num_bits_per_copy=8 * CHUNK_BYTES
        )
        cute.copy(atom, source, target)
