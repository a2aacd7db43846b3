"""The five stages of the fused MoE block: each launches several kernels, one after the other.

Nothing is computed here that the kernels' own objects do not compute. What is saved is the host's
time: one call from Python instead of one for each kernel, and no tensor object for what lies between
two of them.

Legend
    T tokens, D model width, F expert width, E experts, K experts per token, R routed rows, R_max
    their bound, B blocks of 256 tokens, S columns of a table of counts, N parts of a row's dS
    mKept, mScratch: buffers of 32-bit words; block_stages.py says what lies where
"""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64, const_expr

from sonicmoe_kernels.activations import get_activation
from sonicmoe_kernels.block_stages import (
    BlockLayer,
    gradient_parts,
    kept_parts,
    scratch_parts,
    whole,
)
from sonicmoe_kernels.cute.aggregate import Aggregate
from sonicmoe_kernels.cute.balance import Balance
from sonicmoe_kernels.cute.build_rows import instance_of
from sonicmoe_kernels.cute.grouped_gemm_k import GroupedGemmK
from sonicmoe_kernels.cute.membership import Membership
from sonicmoe_kernels.cute.plan_rows import PlanRows
from sonicmoe_kernels.cute.statistics import Statistics, Sums
from sonicmoe_kernels.cute.token_rounding import TokenRounding
from sonicmoe_kernels.cute.topk import TopK
from sonicmoe_kernels.cute.topk_backward import PlanGradients, TopKGradient
from sonicmoe_kernels.tiles import (
    BLOCK_WORDS,
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
        layer = self.layer
        return pick_rows(
            kernel, d=layer.d, f=layer.f, num_experts=self.E, activation=layer.activation
        )

    def aggregation(self, *, weighted: bool) -> Aggregate:
        layer = self.layer
        return Aggregate(
            Aggregation(layer.d, "bfloat16", layer.rows_per_token, weighted, not weighted)
        )

    def kept(self, mKept: cute.Tensor, tokens: Int32, rows: Int32) -> Buffer:
        return Buffer(mKept, kept_parts(self.layer, Int64(tokens), Int64(rows)))

    def rows_of(self, kept: Buffer, name: str, rows: Int32, element: type = Int32) -> cute.Tensor:
        return kept.part(name, element, (rows,))

    def expert_offsets(self, kept: Buffer) -> cute.Tensor:
        return kept.part("expert_offsets", Int32, (self.E + 1,))

    def token_offsets(self, kept: Buffer, tokens: Int32) -> cute.Tensor:
        return kept.part("token_offsets", Int32, (tokens + 1,))

    def chosen(self, buffer: Buffer, name: str, tokens: Int32, element: type) -> cute.Tensor:
        return buffer.part(name, element, (tokens, self.K))


class Hidden(Stage):
    """From the logits to H and Y: top-k, plan, statistics, up, down."""

    def __init__(self, layer: BlockLayer):
        super().__init__(layer)
        E, K, rounding = self.E, self.K, layer.rounding
        options = dataclasses.asdict(layer.routing)
        rounded = None if rounding is None else "any"
        self.topk = TopK(TopKForward(**options, all_scores=rounding is not None))
        self.membership = Membership(RoutingKernel("membership", E, K, "int64", rounded))
        self.plan_rows = PlanRows(RoutingKernel("plan_rows", E, K, "int64", rounded))
        self.balance = Balance(RoutingKernel("balance", E))
        self.token_rounding = TokenRounding(RoutingKernel("token_rounding", rounding=rounding))
        self.statistics = Statistics(layer.routing)
        self.up, self.down = instance_of(self.pick_rows("up")), instance_of(self.pick_rows("down"))

    @cute.jit
    def __call__(
        self,
        mX_TD: cute.Tensor,
        mLogits_TE: cute.Tensor,
        mBias_E: cute.Tensor | None,
        mUniform_E: cute.Tensor | None,
        mW1_EFD: cute.Tensor,
        mW3_EFD: cute.Tensor | None,
        mW2_EDF: cute.Tensor,
        mKept: cute.Tensor,
        mScratch: cute.Tensor,
        mH_RHF: cute.Tensor,
        mY_RD: cute.Tensor,
        mPasses: cute.Tensor,
        mEntropy_P: cute.Tensor,
        mLoad_E: cute.Tensor,
        mTiles_E: cute.Tensor,
        mAdded_E: cute.Tensor,
        mChange_E: cute.Tensor,
        mChoices_E: cute.Tensor,
        scale: Float32,
        tile: Int32,
        sample_stride: Int32,
        counting: Int32,
        num_ctas: Int32,
        stream: CUstream,
    ):
        E, rounding = self.E, self.layer.rounding
        tokens, rows = mX_TD.shape[0], mH_RHF.shape[0]
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
            self.token_rounding(
                mKeys, mBits, mCounts, mAddable, mUniform_E, mGoUp_E, tile, stream, mBefore_E
            )
        mTokenIdx_R = self.rows_of(kept, "token_idx", rows)
        mOffsets = self.expert_offsets(kept)
        self.plan_rows(
            mIds_TK,
            mWeights_TK,
            mScores_TE,
            mBits,
            mCounts,
            mTokenIdx_R,
            self.rows_of(kept, "score", rows, Float32),
            self.rows_of(kept, "source", rows),
            mOffsets,
            self.token_offsets(kept, tokens),
            self.rows_of(kept, "token_rows", rows),
            stream,
        )
        sums = Sums(mPasses, mEntropy_P, mLoad_E, mTiles_E, mAdded_E, mChange_E, mChoices_E)
        if counting != 0:
            first_pass = counting - 1
            self.statistics(
                mLogits_TE, mOffsets, mBefore_E, sums, sample_stride, first_pass, stream
            )
        mA_RF = scratch.part("a", mX_TD.element_type, (rows, self.layer.f))
        self.up(mX_TD, mTokenIdx_R, mOffsets, mW1_EFD, mW3_EFD, mH_RHF, mA_RF, num_ctas, stream)
        self.down(mA_RF, mOffsets, mW2_EDF, mY_RD, num_ctas, stream)


class Combine(Stage):
    """From Y to the output: each token's rows times their scores."""

    def __init__(self, layer: BlockLayer):
        super().__init__(layer)
        self.aggregate = self.aggregation(weighted=True)

    @cute.jit
    def __call__(
        self, mY_RD: cute.Tensor, mKept: cute.Tensor, mOut_TD: cute.Tensor, stream: CUstream
    ):
        tokens, rows = mOut_TD.shape[0], mY_RD.shape[0]
        kept = self.kept(mKept, tokens, rows)
        offsets = None
        if const_expr(self.layer.rows_per_token is None):
            offsets = self.token_offsets(kept, tokens)
        mTokenRows_R = self.rows_of(kept, "token_rows", rows)
        mScore_R = self.rows_of(kept, "score", rows, Float32)
        self.aggregate(mY_RD, mTokenRows_R, offsets, mScore_R, None, mOut_TD, stream)


class HiddenGradient(Stage):
    """From the output's gradient to dH, dW2 and the logits' gradient in two halves."""

    def __init__(self, layer: BlockLayer):
        super().__init__(layer)
        self.d_hidden_gemm = self.pick_rows("d_hidden")
        self.d_hidden = instance_of(self.d_hidden_gemm)
        self.d_weight2 = GroupedGemmK(pick_weights("d_weight2", d=layer.d, f=layer.f))
        self.topk_gradient = TopKGradient(topk_gradient(layer))

    @cute.jit
    def __call__(
        self,
        mDOut_TD: cute.Tensor,
        mLogits_TE: cute.Tensor | None,
        mW2_EDF: cute.Tensor,
        mKept: cute.Tensor,
        mScratch: cute.Tensor,
        mH_RHF: cute.Tensor,
        mDH_RHF: cute.Tensor,
        mDW2_EDF: cute.Tensor,
        mHalves: cute.Tensor,
        scale: Float32,
        num_ctas: Int32,
        stream: CUstream,
    ):
        tokens, rows, parts = mDOut_TD.shape[0], mH_RHF.shape[0], self.d_hidden_gemm.n_tiles
        kept = self.kept(mKept, tokens, rows)
        scratch = Buffer(mScratch, gradient_parts(self.layer, Int64(rows), parts))
        mTokenIdx_R = self.rows_of(kept, "token_idx", rows)
        mOffsets = self.expert_offsets(kept)
        mA_RF = scratch.part("a", mDOut_TD.element_type, (rows, self.layer.f))
        mDScore_NR = scratch.part("dscore", Float32, (parts, rows), (Int64(rows), 1))
        self.d_hidden(
            mDOut_TD,
            mTokenIdx_R,
            mOffsets,
            mW2_EDF,
            self.rows_of(kept, "score", rows, Float32),
            mH_RHF,
            mDH_RHF,
            mA_RF,
            mDScore_NR,
            num_ctas,
            stream,
        )
        self.d_weight2(mDOut_TD, mTokenIdx_R, mOffsets, mA_RF, mDW2_EDF, None, num_ctas, stream)
        plan = PlanGradients(
            mDScore_NR,
            self.rows_of(kept, "source", rows),
            self.rows_of(kept, "token_rows", rows),
            self.token_offsets(kept, tokens),
        )
        mWeights_TK = None
        if const_expr(self.layer.routing.over_chosen):
            mWeights_TK = self.chosen(kept, "weights", tokens, Float32)
        mIds_TK = self.chosen(kept, "ids", tokens, Int64)
        self.topk_gradient(
            None, None, mIds_TK, mWeights_TK, mLogits_TE, mHalves, scale, stream, plan
        )


class InputGradient(Stage):
    """From dH and the gate's share to the input's gradient."""

    def __init__(self, layer: BlockLayer):
        super().__init__(layer)
        self.d_input = instance_of(self.pick_rows("d_input"))
        self.aggregate = self.aggregation(weighted=False)

    @cute.jit
    def __call__(
        self,
        mDH_RHF: cute.Tensor,
        mW1_EFD: cute.Tensor,
        mW3_EFD: cute.Tensor | None,
        mKept: cute.Tensor,
        mDX_RD: cute.Tensor,
        mGate_TD: cute.Tensor,
        mDX_TD: cute.Tensor,
        num_ctas: Int32,
        stream: CUstream,
    ):
        tokens, rows = mDX_TD.shape[0], mDX_RD.shape[0]
        kept = self.kept(mKept, tokens, rows)
        self.d_input(
            mDH_RHF, self.expert_offsets(kept), mW1_EFD, mW3_EFD, mDX_RD, num_ctas, stream
        )
        offsets = None
        if const_expr(self.layer.rows_per_token is None):
            offsets = self.token_offsets(kept, tokens)
        mTokenRows_R = self.rows_of(kept, "token_rows", rows)
        self.aggregate(mDX_RD, mTokenRows_R, offsets, None, mGate_TD, mDX_TD, stream)


class WeightGradients(Stage):
    """From dH to dW1 and dW3."""

    def __init__(self, layer: BlockLayer):
        super().__init__(layer)
        halves = get_activation(layer.activation).halves
        self.d_weight13 = GroupedGemmK(
            pick_weights("d_weight13", d=layer.d, f=layer.f, halves=halves)
        )

    @cute.jit
    def __call__(
        self,
        mX_TD: cute.Tensor,
        mKept: cute.Tensor,
        mDH_RHF: cute.Tensor,
        mDW1_EFD: cute.Tensor,
        mDW3_EFD: cute.Tensor | None,
        num_ctas: Int32,
        stream: CUstream,
    ):
        rows = mDH_RHF.shape[0]
        kept = self.kept(mKept, mX_TD.shape[0], rows)
        mTokenIdx_R, mOffsets = self.rows_of(kept, "token_idx", rows), self.expert_offsets(kept)
        self.d_weight13(
            mX_TD, mTokenIdx_R, mOffsets, mDH_RHF, mDW1_EFD, mDW3_EFD, num_ctas, stream
        )
