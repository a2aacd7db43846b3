"""The router's choice: every token's K best experts and the weights of their outputs.

Legend
    T tokens, E experts, K experts per token
    order: a number's bits as an integer that compares as the number does (expert_row)
    head: the best of a lane's experts that is not chosen yet
"""

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64, const_expr

from sonicmoe_kernels.cute.expert_row import (
    LARGEST,
    SMALLEST,
    ExpertRow,
    number_of,
    order_of,
    select,
    sigmoid,
    warp_max,
)
from sonicmoe_kernels.tiles import (
    RENORMALIZE_EPS,
    WARP,
    TopKForward,
    topk_warps,
    why_illegal_topk,
)

SORTED_PER_LANE = 8  # up to here a lane sorts its experts; with more, the warp searches for it


class TopK:
    """A warp a token: logits in registers, K rounds of two warp reductions, weights in lanes 0..K.

    A round takes the greatest head (integer maximum over the warp) and of equal ones the lowest
    expert (integer minimum), so that the choice is that of a stable descending sort. The lane that
    lost its head takes the next of its list, sorted beforehand into shared memory by swaps of
    neighbours, which keep the order of equals; where a lane owns more than SORTED_PER_LANE experts
    the warp searches that lane's experts together instead.

    Reads T*E logits (and E of bias), writes T*K ids of 8 bytes and weights of 4, and T*E scores of
    4 bytes where they are wanted. Shared memory: a key (and an index) for each register.
    """

    def __init__(self, spec: TopKForward):
        reason = why_illegal_topk(spec)
        if reason is not None:
            raise ValueError(f"topk: {reason}")
        self.spec = spec
        self.row = ExpertRow(spec)
        self.E = spec.num_experts
        self.K = spec.top_k
        self.per_lane = spec.per_lane
        self.is_sorted = spec.per_lane <= SORTED_PER_LANE
        # odd, or lanes would meet in a bank; a sorted list ends with a mark
        self.pitch = (spec.per_lane + 1) | 1
        tables = 2 if self.is_sorted else 1
        self.warps = topk_warps(4 * tables * WARP * self.pitch)
        self.softmax_all = spec.score_func == "softmax" and not spec.over_chosen
        # the choice is made on the logits, unless a bias is added to the scores
        self.chooses_scores = spec.has_bias and spec.softmax_order == "before"

    @cute.jit
    def __call__(
        self,
        mLogits_TE: cute.Tensor,
        mBias_E: cute.Tensor | None,
        mIds_TK: cute.Tensor,
        mWeights_TK: cute.Tensor,
        mScores_TE: cute.Tensor | None,
        scale: Float32,
        stream: CUstream,
    ):
        blocks = cute.ceil_div(mIds_TK.shape[0], self.warps)
        self.kernel(mLogits_TE, mBias_E, mIds_TK, mWeights_TK, mScores_TE, scale).launch(
            grid=[cutlass.max(blocks, 1), 1, 1], block=[self.warps * WARP, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mLogits_TE: cute.Tensor,
        mBias_E: cute.Tensor | None,
        mIds_TK: cute.Tensor,
        mWeights_TK: cute.Tensor,
        mScores_TE: cute.Tensor | None,
        scale: Float32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % WARP
        warp = cute.arch.make_warp_uniform(thread // WARP)
        token = block * self.warps + warp
        tables = cute.make_layout((self.pitch, WARP, self.warps))
        memory = cutlass.memory.SmemAllocator()
        sOrder = memory.allocate_tensor(Int32, tables)[None, None, warp]
        sExpert = sOrder
        if const_expr(self.is_sorted):
            sExpert = memory.allocate_tensor(Int32, tables)[None, None, warp]
        if token < mIds_TK.shape[0]:
            start = Int64(token) * self.E
            rX = self.row.load(mLogits_TE, start, lane, -Float32.inf)
            largest, total = Float32(0.0), Float32(0.0)
            if const_expr(self.chooses_scores):
                largest, total = self.row.to_scores(rX)
            rOrder = self.orders(rX, mBias_E, lane)
            if const_expr(self.is_sorted):
                order, expert = self.choose_sorted(rOrder, sOrder, sExpert, lane)
            else:
                order, expert = self.choose_by_search(rOrder, sOrder, lane)

            everything = self.spec.all_scores or self.softmax_all
            if const_expr(everything and not self.chooses_scores):
                largest, total = self.row.to_scores(rX)
            if const_expr(self.spec.all_scores):
                for i in cutlass.range_constexpr(self.per_lane):
                    rX[i] = rX[i] * scale
                self.row.store(rX, mScores_TE, start, lane)
            logit = -Float32.inf
            if lane < self.K:
                if const_expr(self.spec.has_bias):
                    logit = mLogits_TE[Int64(token), expert].to(Float32)
                else:
                    logit = number_of(order)
            weight = self.weight(logit, lane, largest, total)
            if lane < self.K:
                mIds_TK[Int64(token), lane] = Int64(expert)
                mWeights_TK[Int64(token), lane] = weight * scale

    @cute.jit
    def orders(self, rX: cute.Tensor, mBias_E: cute.Tensor | None, lane: Int32):
        """What the choice compares, SMALLEST past E."""
        rOrder = cute.make_rmem_tensor(self.per_lane, Int32)
        rBias = rX
        if const_expr(self.spec.has_bias):
            rBias = self.row.load(mBias_E, Int64(0), lane, 0.0)
        for i in cutlass.range_constexpr(self.per_lane):
            value = rX[i]
            if const_expr(self.spec.has_bias):
                value = value + rBias[i]
            inside = self.row.is_inside(lane, i // self.row.vector)
            rOrder[i] = select(inside, order_of(value), Int32(SMALLEST))
        return rOrder

    @cute.jit
    def choose_sorted(
        self, rOrder: cute.Tensor, sOrder: cute.Tensor, sExpert: cute.Tensor, lane: Int32
    ):
        """(order, expert) of the k-th choice in lane k; every lane's list is its sorted experts."""
        rExpert = cute.make_rmem_tensor(self.per_lane, Int32)
        for i in cutlass.range_constexpr(self.per_lane):
            rExpert[i] = self.row.expert(lane, i)
        for end in cutlass.range_constexpr(self.per_lane - 1, 0, -1):
            for i in cutlass.range_constexpr(end):
                self.swap_if_less(rOrder, rExpert, i)
        for i in cutlass.range_constexpr(self.per_lane):
            sOrder[i, lane] = rOrder[i]
            sExpert[i, lane] = rExpert[i]
        sOrder[self.per_lane, lane] = Int32(SMALLEST)
        sExpert[self.per_lane, lane] = Int32(LARGEST)

        head, head_expert, place = rOrder[0], rExpert[0], Int32(0)
        order, expert = Int32(SMALLEST), Int32(0)
        for k in cutlass.range_constexpr(self.K):
            best, best_expert = self.best_head(head, head_expert)
            order = select(lane == k, best, order)
            expert = select(lane == k, best_expert, expert)
            if const_expr(k + 1 < self.K):
                place += select(best_expert == head_expert, Int32(1), Int32(0))
                head, head_expert = sOrder[place, lane], sExpert[place, lane]
        return order, expert

    @cute.jit
    def choose_by_search(self, rOrder: cute.Tensor, sOrder: cute.Tensor, lane: Int32):
        """As `choose_sorted`; the warp searches the experts of the lane whose head was taken."""
        head, head_expert = Int32(SMALLEST), Int32(LARGEST)
        for i in cutlass.range_constexpr(self.per_lane):
            sOrder[i, lane] = rOrder[i]
            greater = rOrder[i] > head
            head = select(greater, rOrder[i], head)
            head_expert = select(greater, self.row.expert(lane, i), head_expert)
        order, expert = Int32(SMALLEST), Int32(0)
        for k in cutlass.range(self.K):
            best, best_expert = self.best_head(head, head_expert)
            order = select(lane == k, best, order)
            expert = select(lane == k, best_expert, expert)
            owner, place = self.row.place(best_expert)
            # what others read of this row in the last round has gone through a warp reduction
            if lane == owner:
                sOrder[place, owner] = Int32(SMALLEST)
            cute.arch.sync_warp()
            left, left_expert = Int32(SMALLEST), Int32(LARGEST)
            for step in cutlass.range_constexpr(0, self.per_lane, WARP):
                i = step + lane
                if i < self.per_lane:
                    greater = sOrder[i, owner] > left
                    left = select(greater, sOrder[i, owner], left)
                    left_expert = select(greater, self.row.expert(owner, i), left_expert)
            left, left_expert = self.best_head(left, left_expert)
            head = select(lane == owner, left, head)
            head_expert = select(lane == owner, left_expert, head_expert)
        return order, expert

    @cute.jit
    def swap_if_less(self, rOrder: cute.Tensor, rExpert: cute.Tensor, i: cutlass.Constexpr):
        """Brings the greater of two neighbours to the front; equals stay where they are."""
        first, second = rOrder[i], rOrder[i + 1]
        first_expert, second_expert = rExpert[i], rExpert[i + 1]
        less = first < second
        rOrder[i] = select(less, second, first)
        rOrder[i + 1] = select(less, first, second)
        rExpert[i] = select(less, second_expert, first_expert)
        rExpert[i + 1] = select(less, first_expert, second_expert)

    @cute.jit
    def best_head(self, head: Int32, head_expert: Int32):
        """The greatest of the warp's heads and, of equal ones, the lowest expert."""
        best = cute.arch.warp_redux_sync(head, "max")
        candidate = select(head == best, head_expert, Int32(LARGEST))
        return best, cute.arch.warp_redux_sync(candidate, "min")

    @cute.jit
    def weight(self, logit: Float32, lane: Int32, largest: Float32, total: Float32):
        """The weight of lane k's choice before the route scale; lanes from K on hold -inf."""
        among = 1
        while const_expr(among < self.K):
            among *= 2
        value = Float32(0.0)
        if const_expr(self.spec.score_func == "sigmoid"):
            value = sigmoid(logit)
        else:
            if const_expr(self.spec.over_chosen):
                largest = warp_max(logit)
            value = cute.math.exp(logit - largest)
        divisor = total
        if const_expr(self.spec.over_chosen or self.spec.renormalize):
            divisor = cute.arch.warp_reduction_sum(value, threads_in_group=among)
            if const_expr(self.spec.score_func == "sigmoid"):
                divisor += RENORMALIZE_EPS
            elif const_expr(self.softmax_all):
                divisor += RENORMALIZE_EPS * total
        weight = value
        if const_expr(self.spec.score_func == "softmax" or self.spec.renormalize):
            weight = value * cute.arch.rcp_approx(divisor)
        return weight
