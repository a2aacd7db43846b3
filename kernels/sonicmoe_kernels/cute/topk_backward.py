"""Gradient of the router's logits from those of the K weights, of all scores, or of both.

Legend
    T tokens, E experts, K experts per token; g_k, D_e: incoming gradients times the route scale
    s_e scores (softmax or sigmoid), q_k the K weights before the route scale, S their sum before
    renormalisation

    over the chosen:  dlogit_e = s_e (D_e - sum s D)  + q_k (g_k - sum q g)  where e is the k-th
    else G_e = D_e + c_k where e is the k-th choice, c_k = g_k or (g_k - sum q g) / (S + epsilon):
    softmax           dlogit_e = s_e (G_e - sum s G)
    sigmoid           dlogit_e = s_e (1 - s_e) G_e, as e / (1 + e)^2 of e = exp(-|logit|): 1 - s
                      has lost its digits where s is near 1

    R_max bound on routed rows, N parts of a row's gradient; source: see plan_rows.py
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64, const_expr

from sonicmoe_kernels.cute.expert_row import ExpertRow, sigmoid
from sonicmoe_kernels.tiles import (
    RENORMALIZE_EPS,
    WARP,
    TopKBackward,
    topk_warps,
    why_illegal_topk,
)


@cute.jit
def place_of(
    source: Int32,
    token: Int32,
    num_experts: cutlass.Constexpr,
    top_k: cutlass.Constexpr,
    chosen: cutlass.Constexpr,
) -> Int32:
    """Where a token's row in shared memory has the gradient of a score: by expert, or by choice
    from `chosen` on.
    """
    place = -1 - source - token * num_experts
    if source >= 0:
        place = chosen + source - token * top_k
    return place


class PlanGradients(NamedTuple):
    """The gradients of the scores of a plan's rows, and whose scores they are.

    Written, for the gate's gradients seen as an expert's of 2T rows, a token's two halves each:
    mGateRows the row's token, mGateSpans 0, T, 2T.
    """

    mDScore_NR: cute.Tensor
    mSource_R: cute.Tensor
    mTokenRows_R: cute.Tensor
    mTokenOffsets: cute.Tensor
    mGateRows: cute.Tensor
    mGateSpans: cute.Tensor


class TopKGradient:
    """A warp a token; what the K chosen add finds its expert through a row in shared memory.

    Reads T*K ids of 8 bytes and dweights of 4, T*E dscores of 4 where given, and T*E logits, or
    only T*K weights of 4 bytes where they say everything (tiles.TopKBackward.reads_logits). Writes
    T*E dlogits, every one. Shared memory: E fp32 for each warp.

    With `through_plan` the incoming gradients are read from the plan's rows (4N + 8 bytes each), a
    token's by its warp, and dlogits leave as two bf16 numbers, (T, 2E): what bf16 holds of them,
    and what it holds of the rest.
    """

    def __init__(self, spec: TopKBackward):
        reason = why_illegal_topk(spec)
        if reason is not None:
            raise ValueError(f"topk_backward: {reason}")
        self.spec = spec
        self.row = ExpertRow(spec)
        self.E = spec.num_experts
        self.K = spec.top_k
        self.per_lane = spec.per_lane
        self.is_sigmoid = spec.score_func == "sigmoid"
        self.row_size = WARP * spec.per_lane
        self.chosen_size = WARP if spec.through_plan else 0  # gradients of the K weights
        self.warps = topk_warps(4 * (self.row_size + self.chosen_size))

    @cute.jit
    def __call__(
        self,
        mDWeights_TK: cute.Tensor | None,
        mDScores_TE: cute.Tensor | None,
        mIds_TK: cute.Tensor | None,
        mWeights_TK: cute.Tensor | None,
        mLogits_TE: cute.Tensor | None,
        mDLogits_TE: cute.Tensor,
        scale: Float32,
        stream: CUstream,
    ):
        gradients = (mDWeights_TK, mDScores_TE, None)
        self.launch(*gradients, mIds_TK, mWeights_TK, mLogits_TE, mDLogits_TE, scale, stream)

    def launch(
        self,
        mDWeights_TK,
        mDScores_TE,
        plan,
        mIds_TK,
        mWeights_TK,
        mLogits_TE,
        mDLogits_TE,
        scale,
        stream,
    ):
        """plan: a PlanGradients in place of the first two, with `through_plan`."""
        blocks = cute.ceil_div(mDLogits_TE.shape[0], self.warps)
        self.kernel(
            mDWeights_TK, mDScores_TE, plan, mIds_TK, mWeights_TK, mLogits_TE, mDLogits_TE, scale
        ).launch(
            grid=[cutlass.max(blocks, 1), 1, 1], block=[self.warps * WARP, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mDWeights_TK: cute.Tensor | None,
        mDScores_TE: cute.Tensor | None,
        plan: PlanGradients | None,
        mIds_TK: cute.Tensor | None,
        mWeights_TK: cute.Tensor | None,
        mLogits_TE: cute.Tensor | None,
        mDLogits_TE: cute.Tensor,
        scale: Float32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % WARP
        warp = cute.arch.make_warp_uniform(thread // WARP)
        token = block * self.warps + warp
        rows = cute.make_layout((self.row_size + self.chosen_size, self.warps))
        sRow = cutlass.memory.SmemAllocator().allocate_tensor(Float32, rows, 16)[None, warp]
        if token < mDLogits_TE.shape[0]:
            start = Int64(token) * self.E
            spec = self.spec
            rX = cute.make_rmem_tensor(self.per_lane, Float32)
            rX.fill(0.0)
            rG = cute.make_rmem_tensor(self.per_lane, Float32)
            rG.fill(0.0)
            largest, total = Float32(0.0), Float32(0.0)
            if const_expr(spec.through_plan):
                self.load_from_rows(plan, token, lane, sRow)
            if const_expr(spec.through_plan and spec.d_all):
                own = self.own_part(sRow, lane)
                for i in cutlass.range_constexpr(self.per_lane):
                    rG[i] = own[i] * scale
            elif const_expr(spec.d_all):
                first = Int64(token) * mDScores_TE.stride[0]
                rG = self.row.load(mDScores_TE, first, lane, 0.0)
                for i in cutlass.range_constexpr(self.per_lane):
                    rG[i] = rG[i] * scale
            if const_expr(spec.reads_logits):
                rX = self.row.load(mLogits_TE, start, lane, -Float32.inf)
                if const_expr(not self.is_sigmoid):
                    largest, total = self.row.to_scores(rX)
            expert, dweight = Int32(0), Float32(0.0)
            if const_expr(spec.through_plan):
                if lane < self.K:
                    expert = Int32(mIds_TK[Int64(token), lane])
                dweight = sRow[self.row_size + lane] * scale
            elif const_expr(spec.d_weights):
                expert, dweight = self.load_chosen(mIds_TK, mDWeights_TK, token, lane)
                dweight = dweight * scale

            if const_expr(spec.over_chosen):
                if const_expr(spec.d_all):
                    self.through_scores(rG, rX)
                if const_expr(spec.d_weights):
                    weight = Float32(0.0)
                    if lane < self.K:
                        weight = mWeights_TK[Int64(token), lane] * cute.arch.rcp_approx(scale)
                    mean = cute.arch.warp_reduction_sum(weight * dweight)
                    self.add_chosen(rG, weight * (dweight - mean), expert, lane, sRow)
            else:
                if const_expr(spec.d_weights):
                    share = dweight
                    if const_expr(spec.renormalize):
                        score = Float32(0.0)
                        if lane < self.K:
                            logit = mLogits_TE[Int64(token), expert].to(Float32)
                            score = self.score(logit, largest, total)
                        inverse = cute.arch.rcp_approx(
                            cute.arch.warp_reduction_sum(score) + RENORMALIZE_EPS
                        )
                        mean = cute.arch.warp_reduction_sum(score * inverse * dweight)
                        share = (dweight - mean) * inverse
                    self.add_chosen(rG, share, expert, lane, sRow)
                self.through_scores(rG, rX)
            if const_expr(spec.through_plan):
                self.store_halves(rG, mDLogits_TE, 2 * start, lane)
                self.store_gate_rows(plan, token, mDLogits_TE.shape[0], lane)
            else:
                self.row.store(rG, mDLogits_TE, start, lane)

    @cute.jit
    def load_from_rows(self, plan: PlanGradients, token: Int32, lane: Int32, sRow: cute.Tensor):
        """Writes a token's gradients: E of all scores (0 where none), then one for each lane."""
        own = self.own_part(sRow, lane)
        for i in cutlass.range_constexpr(self.per_lane):
            own[i] = Float32(0.0)
        sRow[self.row_size + lane] = Float32(0.0)
        cute.arch.sync_warp()
        at, end = plan.mTokenOffsets[token] + lane, plan.mTokenOffsets[token + 1]
        while at < end:
            row = plan.mTokenRows_R[at]
            gradient = plan.mDScore_NR[0, row]
            for part in cutlass.range_constexpr(1, plan.mDScore_NR.shape[0]):
                gradient += plan.mDScore_NR[part, row]
            place = place_of(plan.mSource_R[row], token, self.E, self.K, self.row_size)
            sRow[place] = gradient
            at += WARP
        cute.arch.sync_warp()

    @cute.jit
    def store_halves(self, rG: cute.Tensor, mHalves: cute.Tensor, start: Int64, lane: Int32):
        """A row of 2E from element `start`: the rounded numbers, then the rounded rests."""
        self.row.store(rG, mHalves, start, lane)
        for i in cutlass.range_constexpr(self.per_lane):
            rG[i] = rG[i] - rG[i].to(mHalves.element_type).to(Float32)
        self.row.store(rG, mHalves, start + self.E, lane)

    @cute.jit
    def store_gate_rows(self, plan: PlanGradients, token: Int32, num_tokens: Int32, lane: Int32):
        if lane < 2:
            plan.mGateRows[2 * token + lane] = token
        if token == 0 and lane < 3:
            plan.mGateSpans[lane] = lane * num_tokens

    @cute.jit
    def own_part(self, sRow: cute.Tensor, lane: Int32):
        """A lane's experts in its warp's row of shared memory."""
        vector = self.row.vector
        return cute.make_tensor(
            sRow.iterator + lane * vector,
            cute.make_layout((vector, self.row.chunks), stride=(1, WARP * vector)),
        )

    @cute.jit
    def load_chosen(
        self, mIds_TK: cute.Tensor, mDWeights_TK: cute.Tensor, token: Int32, lane: Int32
    ):
        """Lane k's expert and the gradient of its weight; 0 from lane K on."""
        expert, dweight = Int32(0), Float32(0.0)
        if lane < self.K:
            expert = Int32(mIds_TK[Int64(token), lane])
            dweight = mDWeights_TK[Int64(token), lane]
        return expert, dweight

    @cute.jit
    def score(self, logit: Float32, largest: Float32, total: Float32):
        value = Float32(0.0)
        if const_expr(self.is_sigmoid):
            value = sigmoid(logit)
        else:
            value = cute.math.exp(logit - largest) * cute.arch.rcp_approx(total)
        return value

    @cute.jit
    def through_scores(self, rG: cute.Tensor, rX: cute.Tensor):
        """Turns the gradient of the scores into that of the logits, in place.

        rX holds the logits of sigmoid, the scores of softmax.
        """
        if const_expr(self.is_sigmoid):
            for i in cutlass.range_constexpr(self.per_lane):
                decay = cute.math.exp(-cute.arch.fmax(rX[i], -rX[i]))
                inverse = cute.arch.rcp_approx(1.0 + decay)
                rG[i] = rG[i] * (decay * inverse * inverse)
        else:
            mean = Float32(0.0)
            for i in cutlass.range_constexpr(self.per_lane):
                mean += rX[i] * rG[i]
            mean = cute.arch.warp_reduction_sum(mean)
            for i in cutlass.range_constexpr(self.per_lane):
                rG[i] = rX[i] * (rG[i] - mean)

    @cute.jit
    def add_chosen(
        self, rG: cute.Tensor, share: Float32, expert: Int32, lane: Int32, sRow: cute.Tensor
    ):
        """Adds lane k's share to its expert, wherever in the warp that lies."""
        own = self.own_part(sRow, lane)
        for i in cutlass.range_constexpr(self.per_lane):
            own[i] = Float32(0.0)
        cute.arch.sync_warp()
        if lane < self.K:
            sRow[expert] = share
        cute.arch.sync_warp()
        for i in cutlass.range_constexpr(self.per_lane):
            rG[i] = rG[i] + own[i]
