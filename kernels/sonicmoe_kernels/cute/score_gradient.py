"""Backward of a plan's scores: each row's gradient goes to the pair that its score came from.

A pair owns at most one row, so plain stores do. Rows that nobody owns are not read.

Legend
    T tokens, E experts, K experts per token, R_max bound on routed rows
    source: see plan_rows.py
"""

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from sonicmoe_kernels.tiles import NO_SOURCE, RoutingKernel

THREADS = 256


class ScoreGradient:
    """A thread for each row. Reads 8 R_max bytes, writes 4R (a 32-byte sector each).

    Writes into zeros what has an owner: of a top-k plan that is every element of mChosen_P (T * K);
    mAdded_P is (T * E). Either may be missing.
    """

    def __init__(self, spec: RoutingKernel):
        assert spec.scores
        self.chosen = "chosen" in spec.scores
        self.added = "added" in spec.scores

    @cute.jit
    def __call__(
        self,
        mDScore_R: cute.Tensor,
        mSource_R: cute.Tensor,
        mChosen_P: cute.Tensor | None,
        mAdded_P: cute.Tensor | None,
        stream: CUstream,
    ):
        blocks = cute.ceil_div(mSource_R.shape[0], THREADS)
        self.kernel(mDScore_R, mSource_R, mChosen_P, mAdded_P).launch(
            grid=[cutlass.max(blocks, 1), 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mDScore_R: cute.Tensor,
        mSource_R: cute.Tensor,
        mChosen_P: cute.Tensor | None,
        mAdded_P: cute.Tensor | None,
    ):
        row = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        if row < mSource_R.shape[0]:
            source = mSource_R[row]
            gradient = mDScore_R[row]
            if const_expr(self.chosen):
                self.store_if(source >= 0, mChosen_P, source, gradient)
            if const_expr(self.added):
                added = source < 0 and source != NO_SOURCE
                self.store_if(added, mAdded_P, -1 - source, gradient)

    @cute.jit
    def store_if(self, owned: Boolean, mGradient_P: cute.Tensor, pair: Int32, gradient: Float32):
        if owned:
            mGradient_P[Int64(pair)] = gradient
