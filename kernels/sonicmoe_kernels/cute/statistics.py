"""What one forward pass adds to a router's statistics; CTAs of plan_rows.py's launch do it.

    entropy: - sum p ln p of every token of a sample, p the router's probabilities
    rows per expert, their whole GEMM tiles, what token rounding added and changed, choices

Legend
    T tokens, E experts, S sampled tokens: every stride-th
    P parts, a CTA for each, with an entry of its own in a table of sums: no order of additions is
    left open
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from sonicmoe_kernels.cute.expert_row import ExpertRow
from sonicmoe_kernels.tiles import STATISTICS_CTAS, TILE_M, TOKEN_BLOCK, WARP, TopKOptions

THREADS = TOKEN_BLOCK  # of a CTA of plan_rows.py
WARPS = THREADS // WARP


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


class Counted(NamedTuple):
    """What a pass counts, and where it adds it.

    mChosen_E: choices before rounding, None where nothing rounds. stride: every which token is
    sampled. first_pass: 0 in a recomputed pass, which adds to the choices alone, as TorchTitan's
    block does.
    """

    mLogits_TE: cute.Tensor
    mChosen_E: cute.Tensor | None
    sums: Sums
    stride: Int32
    first_pass: Int32


class Statistics:
    """A warp for each sampled token, a thread for each expert.

    Reads 4SE bytes of logits, adds to 20E + 4P + 8 bytes.
    """

    def __init__(self, spec: TopKOptions):
        self.row = ExpertRow(spec)
        self.E = spec.num_experts
        self.per_lane = spec.per_lane
        self.is_sigmoid = spec.score_func == "sigmoid"

    @cute.jit
    def add(self, part: Int32, sRows_E: cute.Tensor, sNats: cute.Tensor, counted: Counted):
        """Adds part `part` of STATISTICS_CTAS. All THREADS threads of a CTA call it.

        sRows_E: each expert's rows, visible to all. sNats: WARPS float32 of scratch.
        """
        mLogits_TE, mChosen_E, sums, stride, first_pass = counted
        thread = cute.arch.thread_idx()[0]
        expert = part * THREADS + thread
        if expert < self.E:
            self.count(expert, sRows_E[expert], mChosen_E, sums, first_pass)
        if first_pass != 0:
            num_tokens = mLogits_TE.shape[0]
            samples = (num_tokens + stride - 1) // stride
            warp = cute.arch.make_warp_uniform(thread // WARP)
            nats = Float32(0.0)
            for sample in cutlass.range(part * WARPS + warp, samples, STATISTICS_CTAS * WARPS):
                nats += self.entropy(mLogits_TE, Int64(sample) * stride, thread % WARP)
            if thread % WARP == 0:
                sNats[warp] = nats
            cute.arch.sync_threads()
            if thread == 0:
                total = sNats[0]
                for w in cutlass.range_constexpr(1, WARPS):
                    total += sNats[w]
                share = Float32(num_tokens) / Float32(samples)
                sums.mEntropy_P[part] = sums.mEntropy_P[part] + share * total
                if part == 0:
                    sums.mPasses[0] = sums.mPasses[0] + 1.0
                    sums.mPasses[1] = sums.mPasses[1] + Float32(num_tokens)

    @cute.jit
    def count(
        self,
        expert: Int32,
        rows: Int32,
        mChosen_E: cute.Tensor | None,
        sums: Sums,
        first_pass: Int32,
    ):
        """Adds one expert's rows."""
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
