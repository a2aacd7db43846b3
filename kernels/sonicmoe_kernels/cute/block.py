"""The stages of the fused MoE block: each launches several kernels, one after the other.

Nothing is computed here that the kernels' own objects do not compute. What this saves is the host's
time: one call from Python instead of one for each kernel, and no tensor object for what lies
between two of them.

Legend
    B batch, L sequence, T = B * L tokens, D model width, F expert width, E experts, K experts per
    token, R routed rows (bound R_max), N parts of a row's dS
    mKept, mScratch: buffers of 32-bit words; block_stages.py says what lies where
"""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Float32, Int32, Int64, const_expr

from sonicmoe_kernels.block_stages import (
    GATE_SPANS,
    BlockLayer,
    gradient_parts,
    halves_of,
    kept_parts,
    scratch_parts,
    whole,
)
from sonicmoe_kernels.cute.aggregate import Aggregate
from sonicmoe_kernels.cute.balance import Balance
from sonicmoe_kernels.cute.build_rows import instance_of
from sonicmoe_kernels.cute.grouped_gemm_k import GroupedGemmK
from sonicmoe_kernels.cute.membership import Membership
from sonicmoe_kernels.cute.plan_rows import Choices, PlanRows, Rows
from sonicmoe_kernels.cute.statistics import Counted, Statistics, Sums
from sonicmoe_kernels.cute.token_rounding import TokenRounding
from sonicmoe_kernels.cute.topk import TopK
from sonicmoe_kernels.cute.topk_backward import PlanGradients, TopKGradient
from sonicmoe_kernels.tiles import (
    BLOCK_WORDS,
    STATISTICS_CTAS,
    TOKEN_BLOCK,
    Aggregation,
    RoutingKernel,
    TopKBackward,
    TopKForward,
    count_columns,
    pick_rows,
    pick_weights,
)


def topk_gradient(layer: BlockLayer) -> TopKBackward:
    """What the backward of a layer's choice is compiled for."""
    options = dataclasses.asdict(layer.routing)
    added = layer.rounding is not None
    return TopKBackward(**options, d_weights=True, d_all=added, through_plan=True)


class Buffer:
    """A buffer of words and where its parts begin."""

    def __init__(self, mWords: cute.Tensor, parts: dict[str, Any]):
        self.words = mWords.iterator
        self.begins: dict[str, Any] = {}
        begin = Int64(0)
        for name, length in parts.items():
            self.begins[name] = begin
            begin = cute.assume(begin + whole(length), divby=4)

    def part(self, name: str, element: type, shape: Any, stride: Any = None) -> cute.Tensor:
        """A part as a tensor, contiguous unless `stride` says otherwise."""
        start = cute.recast_ptr((self.words + self.begins[name]).align(16), dtype=element)
        if stride is None:
            stride = [1]
            for extent in reversed(shape[1:]):
                stride.insert(0, stride[0] * extent)
        return cute.make_tensor(start, cute.make_layout(tuple(shape), stride=tuple(stride)))


class Stage:
    """What the stages share: sizes, and the plan as it lies in the kept buffer."""

    def __init__(self, layer: BlockLayer):
        self.layer = layer
        self.E, self.K = layer.routing.num_experts, layer.routing.top_k

    def pick_rows(self, kernel: str):
        """As for the experts alone, but lean: a counter would cost the host's time."""
        layer = self.layer
        sizes = {"d": layer.d, "f": layer.f, "num_experts": self.E}
        return pick_rows(kernel, **sizes, activation=layer.activation, lean=True)

    def aggregation(self, *, weighted: bool) -> Aggregate:
        layer = self.layer
        return Aggregate(
            Aggregation(layer.d, "bfloat16", layer.rows_per_token, weighted, not weighted)
        )

    def flat(self, mX_BLD: cute.Tensor) -> cute.Tensor:
        """(B, L, D) as (T, D)."""
        tokens, d = mX_BLD.shape[0] * mX_BLD.shape[1], self.layer.d
        return cute.make_tensor(mX_BLD.iterator, cute.make_layout((tokens, d), stride=(d, 1)))

    def kept(self, mKept: cute.Tensor, tokens: Int32, rows: Int32) -> Buffer:
        return Buffer(mKept, kept_parts(self.layer, Int64(tokens), Int64(rows)))

    def rows_of(self, kept: Buffer, name: str, rows: Int32, element: type = Int32) -> cute.Tensor:
        return kept.part(name, element, (rows,))

    def expert_offsets(self, kept: Buffer) -> cute.Tensor:
        return kept.part("expert_offsets", Int32, (self.E + 1,))

    def token_offsets(self, kept: Buffer, tokens: Int32) -> cute.Tensor:
        return kept.part("token_offsets", Int32, (tokens + 1,))

    def h(self, kept: Buffer, rows: Int32) -> cute.Tensor:
        return kept.part("h", BFloat16, (rows, halves_of(self.layer), self.layer.f))

    def chosen(self, buffer: Buffer, name: str, tokens: Int32, element: type) -> cute.Tensor:
        return buffer.part(name, element, (tokens, self.K))


class Forward(Stage):
    """From the logits to the output: top-k, plan and statistics, up, down, aggregation."""

    def __init__(self, layer: BlockLayer):
        super().__init__(layer)
        E, K, rounding = self.E, self.K, layer.rounding
        options = dataclasses.asdict(layer.routing)
        rounded = None if rounding is None else "any"
        self.topk = TopK(TopKForward(**options, all_scores=rounding is not None))
        self.membership = Membership(RoutingKernel("membership", E, K, "int64", rounded))
        self.plan_rows = PlanRows(
            RoutingKernel("plan_rows", E, K, "int64", rounded), Statistics(layer.routing)
        )
        self.balance = Balance(RoutingKernel("balance", E))
        self.token_rounding = TokenRounding(RoutingKernel("token_rounding", rounding=rounding))
        self.up, self.down = instance_of(self.pick_rows("up")), instance_of(self.pick_rows("down"))
        self.aggregate = self.aggregation(weighted=True)

    @cute.jit
    def __call__(
        self,
        mX_BLD: cute.Tensor,
        mLogits_TE: cute.Tensor,
        mBias_E: cute.Tensor | None,
        mUniform_E: cute.Tensor | None,
        mW1_EFD: cute.Tensor,
        mW3_EFD: cute.Tensor | None,
        mW2_EDF: cute.Tensor,
        mKept: cute.Tensor,
        mScratch: cute.Tensor,
        mOut_BLD: cute.Tensor,
        mPasses: cute.Tensor,
        mEntropy_P: cute.Tensor,
        mLoad_E: cute.Tensor,
        mTiles_E: cute.Tensor,
        mAdded_E: cute.Tensor,
        mChange_E: cute.Tensor,
        mChoices_E: cute.Tensor,
        rows: Int32,
        scale: Float32,
        tile: Int32,
        sample_stride: Int32,
        counting: Int32,
        num_ctas: Int32,
        stream: CUstream,
    ):
        E, rounding, mX_TD = self.E, self.layer.rounding, self.flat(mX_BLD)
        tokens = mX_TD.shape[0]
        kept = self.kept(mKept, tokens, rows)
        scratch = Buffer(mScratch, scratch_parts(self.layer, Int64(tokens), Int64(rows)))
        mIds_TK = self.chosen(kept, "ids", tokens, Int64)
        over_chosen = self.layer.routing.over_chosen
        mWeights_TK = self.chosen(kept if over_chosen else scratch, "weights", tokens, Float32)
        mScores_TE = mAddable = mKeys = mBefore_E = mGoUp_E = None
        blocks = (tokens + TOKEN_BLOCK - 1) // TOKEN_BLOCK
        columns = count_columns(E)
        mBits = scratch.part("bits", Int32, (blocks, E, BLOCK_WORDS))
        mCounts = scratch.part("counts", Int32, (blocks, columns))
        if const_expr(rounding is not None):
            mScores_TE = scratch.part("scores", Float32, (tokens, E))
            mAddable = scratch.part("addable", Int32, (blocks, columns))
            width = cute.assume(Int64(blocks) * TOKEN_BLOCK, divby=TOKEN_BLOCK)
            mKeys = scratch.part("keys", Int32, (E, blocks * TOKEN_BLOCK), (width, 1))
            mBefore_E = scratch.part("chosen", Int32, (E,))
        if const_expr(rounding == "balance"):
            mGoUp_E = scratch.part("go_up", Int32, (E,))

        self.topk(mLogits_TE, mBias_E, mIds_TK, mWeights_TK, mScores_TE, scale, stream)
        self.membership(mIds_TK, mScores_TE, mBits, mCounts, mAddable, mKeys, stream)
        if const_expr(rounding == "balance"):
            self.balance(mCounts, mAddable, mGoUp_E, tile, stream)
        if const_expr(rounding is not None):
            tables = (mKeys, mBits, mCounts, mAddable)
            self.token_rounding.launch(*tables, mUniform_E, mGoUp_E, mBefore_E, tile, stream)
        mTokenIdx_R = self.rows_of(kept, "token_idx", rows)
        mScore_R = self.rows_of(kept, "score", rows, Float32)
        mTokenRows_R = self.rows_of(kept, "token_rows", rows)
        mOffsets, mTokenOffsets = self.expert_offsets(kept), self.token_offsets(kept, tokens)
        mSource_R = self.rows_of(kept, "source", rows)
        sums = Sums(mPasses, mEntropy_P, mLoad_E, mTiles_E, mAdded_E, mChange_E, mChoices_E)
        counting_ctas = Int32(0)
        if counting != 0:
            counting_ctas = Int32(STATISTICS_CTAS)
        self.plan_rows.launch(
            Choices(mIds_TK, mWeights_TK, mScores_TE, mBits, mCounts),
            Rows(mTokenIdx_R, mScore_R, mSource_R, mTokenRows_R, mOffsets, mTokenOffsets),
            Counted(mLogits_TE, mBefore_E, sums, sample_stride, counting - 1),
            counting_ctas,
            stream,
        )
        mA_RF = scratch.part("a", BFloat16, (rows, self.layer.f))
        mY_RD = scratch.part("y", BFloat16, (rows, self.layer.d))
        mH_RHF = self.h(kept, rows)
        self.up(
            None, mX_TD, mTokenIdx_R, mOffsets, mW1_EFD, mW3_EFD, mH_RHF, mA_RF, num_ctas, stream
        )
        self.down(None, mA_RF, mOffsets, mW2_EDF, mY_RD, num_ctas, stream)
        offsets = mTokenOffsets if const_expr(self.layer.rows_per_token is None) else None
        mOut_TD = self.flat(mOut_BLD)
        self.aggregate(mY_RD, mTokenRows_R, offsets, mScore_R, None, mOut_TD, stream)


class WeightGradients(Stage):
    """From dH to dW1 and dW3."""

    def __init__(self, layer: BlockLayer):
        super().__init__(layer)
        gemm = pick_weights("d_weight13", d=layer.d, f=layer.f, halves=halves_of(layer))
        self.d_weight13 = GroupedGemmK(gemm)

    @cute.jit
    def __call__(
        self,
        mX_BLD: cute.Tensor,
        mKept: cute.Tensor,
        mDW1_EFD: cute.Tensor,
        mDW3_EFD: cute.Tensor | None,
        rows: Int32,
        num_ctas: Int32,
        stream: CUstream,
    ):
        mX_TD = self.flat(mX_BLD)
        kept = self.kept(mKept, mX_TD.shape[0], rows)
        mTokenIdx_R, mOffsets = self.rows_of(kept, "token_idx", rows), self.expert_offsets(kept)
        mDH = self.h(kept, rows)
        self.d_weight13(mX_TD, mTokenIdx_R, mOffsets, mDH, mDW1_EFD, mDW3_EFD, num_ctas, stream)


class Gradients(Stage):
    """From the output's gradient to dX, dW2, and dH, which takes H's place; the others' if wanted.

    The gate is an expert of its own here. Its share of dX is that of an expert whose two weights
    are both the gate and whose dH are the two halves of the logits' gradient; its weight's gradient
    that of an ungated expert with the halves for rows, two of each token.
    """

    def __init__(self, layer: BlockLayer):
        super().__init__(layer)
        self.d_hidden_gemm = self.pick_rows("d_hidden")
        self.d_hidden = instance_of(self.d_hidden_gemm)
        self.d_weight2 = GroupedGemmK(pick_weights("d_weight2", d=layer.d, f=layer.f))
        self.topk_gradient = TopKGradient(topk_gradient(layer))
        self.gate_input = instance_of(pick_rows("d_input", d=layer.d, f=self.E, num_experts=1))
        self.gate_weight = GroupedGemmK(pick_weights("d_weight13", d=layer.d, f=self.E))
        self.d_input = instance_of(self.pick_rows("d_input"))
        self.aggregate = self.aggregation(weighted=False)
        self.weight_gradients = WeightGradients(layer)

    @cute.jit
    def __call__(
        self,
        mDOut_BLD: cute.Tensor,
        mX_BLD: cute.Tensor,
        mLogits_TE: cute.Tensor | None,
        mGate_ED: cute.Tensor,
        mW1_EFD: cute.Tensor,
        mW3_EFD: cute.Tensor | None,
        mW2_EDF: cute.Tensor,
        mKept: cute.Tensor,
        mScratch: cute.Tensor,
        mDW2_EDF: cute.Tensor,
        mDX_BLD: cute.Tensor,
        mDGate_ED: cute.Tensor | None,
        mDW1_EFD: cute.Tensor | None,
        mDW3_EFD: cute.Tensor | None,
        rows: Int32,
        scale: Float32,
        num_ctas: Int32,
        stream: CUstream,
    ):
        E, d, parts = self.E, self.layer.d, self.d_hidden_gemm.n_tiles
        mDOut_TD, mX_TD, mDX_TD = (self.flat(m) for m in (mDOut_BLD, mX_BLD, mDX_BLD))
        tokens = mX_TD.shape[0]
        kept = self.kept(mKept, tokens, rows)
        scratch = Buffer(mScratch, gradient_parts(self.layer, Int64(tokens), Int64(rows), parts))
        mTokenIdx_R = self.rows_of(kept, "token_idx", rows)
        mOffsets, mH_RHF = self.expert_offsets(kept), self.h(kept, rows)
        mA_RF = scratch.part("rows", BFloat16, (rows, self.layer.f))
        mDScore_NR = scratch.part("dscore", Float32, (parts, rows), (Int64(rows), 1))
        self.d_hidden(
            None,
            mDOut_TD,
            mTokenIdx_R,
            mOffsets,
            mW2_EDF,
            self.rows_of(kept, "score", rows, Float32),
            mH_RHF,
            mH_RHF,
            mA_RF,
            mDScore_NR,
            num_ctas,
            stream,
        )
        self.d_weight2(mDOut_TD, mTokenIdx_R, mOffsets, mA_RF, mDW2_EDF, None, num_ctas, stream)
        mGateRows = scratch.part("gate_rows", Int32, (2 * tokens,))
        mGateSpans = scratch.part("gate_spans", Int32, (GATE_SPANS,))
        plan = PlanGradients(
            mDScore_NR,
            self.rows_of(kept, "source", rows),
            self.rows_of(kept, "token_rows", rows),
            self.token_offsets(kept, tokens),
            mGateRows,
            mGateSpans,
        )
        mWeights_TK = None
        if const_expr(self.layer.routing.over_chosen):
            mWeights_TK = self.chosen(kept, "weights", tokens, Float32)
        mIds_TK = self.chosen(kept, "ids", tokens, Int64)
        mHalves = scratch.part("halves", BFloat16, (tokens, 2 * E))
        self.topk_gradient.launch(
            None, None, plan, mIds_TK, mWeights_TK, mLogits_TE, mHalves, scale, stream
        )
        one = cute.make_layout((1, E, d), stride=(E * d, d, 1))
        mGate = cute.make_tensor(mGate_ED.iterator, one)
        mHalves = scratch.part("halves", BFloat16, (tokens, 2, E))
        mSpan = cute.make_tensor(mGateSpans.iterator, cute.make_layout(2))
        self.gate_input(None, mHalves, mSpan, mGate, mGate, mDX_TD, num_ctas, stream)
        if const_expr(mDGate_ED is not None):
            mDGate = cute.make_tensor(mDGate_ED.iterator, one)
            mHalves = scratch.part("halves", BFloat16, (2 * tokens, 1, E))
            mSpan = cute.make_tensor(mGateSpans.iterator, cute.make_layout(2, stride=2))
            self.gate_weight(mX_TD, mGateRows, mSpan, mHalves, mDGate, None, num_ctas, stream)
        mDX_RD = scratch.part("rows", BFloat16, (rows, d))
        self.d_input(None, mH_RHF, mOffsets, mW1_EFD, mW3_EFD, mDX_RD, num_ctas, stream)
        offsets = None
        if const_expr(self.layer.rows_per_token is None):
            offsets = plan.mTokenOffsets
        self.aggregate(mDX_RD, plan.mTokenRows_R, offsets, None, mDX_TD, mDX_TD, stream)
        if const_expr(mDW1_EFD is not None):
            self.weight_gradients(mX_BLD, mKept, mDW1_EFD, mDW3_EFD, rows, num_ctas, stream)
