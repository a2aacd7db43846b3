"""What one forward pass adds to a router's statistics, all of it in one launch.

    entropy: - sum p ln p of every token of a sample, p the router's probabilities
    rows per expert, their whole GEMM tiles, what token rounding added and changed, choices

Legend
    T tokens, E experts, S sampled tokens: every stride-th
    P CTAs, each with an entry of its own in a table of sums: no order of additions is left open
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64, const_expr

from sonicmoe_kernels.cute.expert_row import ExpertRow
from sonicmoe_kernels.tiles import STATISTICS_CTAS, TILE_M, WARP, TopKOptions

WARPS = 8
THREADS = WARPS * WARP


@cute.jit
def nats_of(probability: Float32) -> Float32:
    """- p ln p, 0 where p is 0."""
    nats = Float32(0.0)
    if probability != 0.0:
        nats = -probability * cute.math.log(probability)
    return nats


class Sums(NamedTuple):
    """Running sums of float32; `router_sums.RouterSums` says what each one is."""

    mPasses: cute.Tensor
    mEntropy_P: cute.Tensor
    mLoad_E: cute.Tensor
    mTiles_E: cute.Tensor
    mAdded_E: cute.Tensor
    mChange_E: cute.Tensor
    mChoices_E: cute.Tensor


class Statistics:
    """A warp for each sampled token, a thread for each expert.

    Reads 4SE bytes of logits and 8E of counts, adds to 20E + 4P + 8 bytes. A recomputed pass adds
    to the choices alone (`first_pass` 0), as TorchTitan's block does.
    """

    def __init__(self, spec: TopKOptions):
        self.row = ExpertRow(spec)
        self.E = spec.num_experts
        self.per_lane = spec.per_lane
        self.is_sigmoid = spec.score_func == "sigmoid"

    @cute.jit
    def __call__(
        self,
        mLogits_TE: cute.Tensor,
        mExpertOffsets: cute.Tensor,
        mChosen_E: cute.Tensor | None,
        sums: Sums,
        stride: Int32,
        first_pass: Int32,
        stream: CUstream,
    ):
        self.kernel(mLogits_TE, mExpertOffsets, mChosen_E, sums, stride, first_pass).launch(
            grid=[STATISTICS_CTAS, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mLogits_TE: cute.Tensor,
        mExpertOffsets: cute.Tensor,
        mChosen_E: cute.Tensor | None,
        sums: Sums,
        stride: Int32,
        first_pass: Int32,
    ):
        thread = cute.arch.thread_idx()[0]
        block = cute.arch.block_idx()[0]
        sNats = cutlass.memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout(WARPS), 16)
        expert = block * THREADS + thread
        if expert < self.E:
            self.count(expert, mExpertOffsets, mChosen_E, sums, first_pass)
        if first_pass != 0:
            num_tokens = mLogits_TE.shape[0]
            samples = (num_tokens + stride - 1) // stride
            warp = cute.arch.make_warp_uniform(thread // WARP)
            nats = Float32(0.0)
            for sample in cutlass.range(block * WARPS + warp, samples, STATISTICS_CTAS * WARPS):
                nats += self.entropy(mLogits_TE, Int64(sample) * stride, thread % WARP)
            if thread % WARP == 0:
                sNats[warp] = nats
            cute.arch.sync_threads()
            if thread == 0:
                total = sNats[0]
                for w in cutlass.range_constexpr(1, WARPS):
                    total += sNats[w]
                share = Float32(num_tokens) / Float32(samples)
                sums.mEntropy_P[block] = sums.mEntropy_P[block] + share * total
                if block == 0:
                    sums.mPasses[0] = sums.mPasses[0] + 1.0
                    sums.mPasses[1] = sums.mPasses[1] + Float32(num_tokens)

    @cute.jit
    def count(
        self,
        expert: Int32,
        mExpertOffsets: cute.Tensor,
        mChosen_E: cute.Tensor | None,
        sums: Sums,
        first_pass: Int32,
    ):
        """Adds one expert's rows."""
        rows = mExpertOffsets[expert + 1] - mExpertOffsets[expert]
        chosen = rows
        if const_expr(mChosen_E is not None):
            chosen = mChosen_E[expert]
        sums.mChoices_E[expert] = sums.mChoices_E[expert] + Float32(chosen)
        if first_pass != 0:
            tiles = (rows + TILE_M - 1) // TILE_M
            sums.mLoad_E[expert] = sums.mLoad_E[expert] + Float32(rows)
            sums.mTiles_E[expert] = sums.mTiles_E[expert] + Float32(tiles)
            if const_expr(mChosen_E is not None):
                change = rows - chosen
                added = cutlass.max(change, 0)
                sums.mChange_E[expert] = sums.mChange_E[expert] + Float32(change)
                sums.mAdded_E[expert] = sums.mAdded_E[expert] + Float32(added)

    @cute.jit
    def entropy(self, mLogits_TE: cute.Tensor, token: Int64, lane: Int32) -> Float32:
        """In nats, of one token, in every lane; a probability of 0 adds 0."""
        rX = self.row.load(mLogits_TE, token * self.E, lane, -Float32.inf)
        self.row.to_scores(rX)
        inverse = Float32(1.0)
        if const_expr(self.is_sigmoid):
            total = Float32(0.0)
            for i in cutlass.range_constexpr(self.per_lane):
                total += rX[i]
            inverse = cute.arch.rcp_approx(cute.arch.warp_reduction_sum(total))
        nats = Float32(0.0)
        for i in cutlass.range_constexpr(self.per_lane):
            nats += nats_of(rX[i] * inverse)
        return cute.arch.warp_reduction_sum(nats)
