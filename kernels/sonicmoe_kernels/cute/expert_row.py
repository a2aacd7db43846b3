"""A warp's view of one token's row of E numbers, one for each expert.

Legend: E experts, T tokens.

Lane l owns `vector` neighbours of every chunk of 32 * vector experts, so that a warp reads a row in
whole lines and a lane's experts ascend. Experts past E exist in registers only.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from sonicmoe_kernels.tiles import WARP, TopKOptions

SMALLEST = -(2**31)  # below the order of every number, NaN included
LARGEST = 2**31 - 1


@cute.jit
def select(condition: cutlass.Boolean, yes: Int32, no: Int32) -> Int32:
    """`yes` where the condition holds, without a branch."""
    return Int32(cutlass.select_(condition, yes, no))


@cute.jit
def order_of(x: Float32) -> Int32:
    """The integer that orders as the number does; both zeros are 0, NaNs lie outside +-inf."""
    bits = x.bitcast(Int32)
    return select(bits < 0, Int32(SMALLEST) - bits, bits)


@cute.jit
def number_of(order: Int32) -> Float32:
    """Inverse of `order_of`."""
    return select(order < 0, Int32(SMALLEST) - order, order).bitcast(Float32)


@cute.jit
def warp_max(x: Float32) -> Float32:
    """The greatest number of a warp's 32."""
    return number_of(cute.arch.warp_redux_sync(order_of(x), "max"))


@cute.jit
def sigmoid(x: Float32) -> Float32:
    """Within two units in the last place; exp overflows to inf, whose inverse is 0."""
    return cute.arch.rcp_approx(1.0 + cute.math.exp(-x))


class ExpertRow:
    """Loads, stores and scores a row that lies across the registers of a warp."""

    def __init__(self, spec: TopKOptions):
        self.E = spec.num_experts
        self.vector = spec.vector
        self.chunks = spec.chunks
        self.per_lane = spec.per_lane
        self.is_sigmoid = spec.score_func == "sigmoid"

    @cute.jit
    def expert(self, lane: Int32, i: Int32) -> Int32:
        """The expert of a lane's i-th register."""
        return i // self.vector * (WARP * self.vector) + lane * self.vector + i % self.vector

    @cute.jit
    def place(self, expert: Int32):
        """(lane, i) of an expert."""
        within = expert % (WARP * self.vector)
        return within // self.vector, (
            expert // (WARP * self.vector) * self.vector + within % self.vector
        )

    @cute.jit
    def is_inside(self, lane: Int32, chunk: cutlass.Constexpr):
        """Whether a lane's part of a chunk lies below E: all of it does or nothing."""
        return chunk * WARP * self.vector + lane * self.vector < self.E

    @cute.jit
    def load(self, mX: cute.Tensor, start: Int64, lane: Int32, fill: cutlass.Constexpr):
        """The lane's registers as fp32, `fill` past E; the row begins at element `start`."""
        raw = cute.make_rmem_tensor((self.vector, self.chunks), mX.element_type)
        raw.fill(fill)
        for chunk in cutlass.range_constexpr(self.chunks):
            if self.is_inside(lane, chunk):
                self.copy(self.part(mX, start, lane, chunk), raw[None, chunk])
        rX = cute.make_rmem_tensor(self.per_lane, Float32)
        for i in cutlass.range_constexpr(self.per_lane):
            rX[i] = raw[i].to(Float32)
        return rX

    @cute.jit
    def store(self, rX: cute.Tensor, mX: cute.Tensor, start: Int64, lane: Int32):
        """Inverse of `load`, rounded to the dtype of mX."""
        raw = cute.make_rmem_tensor((self.vector, self.chunks), mX.element_type)
        for i in cutlass.range_constexpr(self.per_lane):
            raw[i] = rX[i].to(mX.element_type)
        for chunk in cutlass.range_constexpr(self.chunks):
            if self.is_inside(lane, chunk):
                self.copy(raw[None, chunk], self.part(mX, start, lane, chunk))

    @cute.jit
    def part(self, mX: cute.Tensor, start: Int64, lane: Int32, chunk: cutlass.Constexpr):
        offset = start + chunk * WARP * self.vector + lane * self.vector
        offset = cute.assume(offset, divby=self.vector)
        return cute.make_tensor(mX.iterator + offset, cute.make_layout(self.vector))

    @cute.jit
    def copy(self, source: cute.Tensor, target: cute.Tensor):
        bits = self.vector * source.element_type.width
        atom = cute.make_copy_atom(
            cute.nvgpu.CopyUniversalOp(), source.element_type, num_bits_per_copy=bits
        )
        cute.copy(atom, source, target)

    @cute.jit
    def to_scores(self, rX: cute.Tensor):
        """Turns logits into scores in place.

        Returns the maximum of the logits and the sum of exp(logit - maximum), which a single
        logit's softmax takes; zeros with sigmoid.
        """
        largest, total = Float32(0.0), Float32(0.0)
        if const_expr(self.is_sigmoid):
            for i in cutlass.range_constexpr(self.per_lane):
                rX[i] = sigmoid(rX[i])
        else:
            largest = rX[0]
            for i in cutlass.range_constexpr(1, self.per_lane):
                largest = cute.arch.fmax(largest, rX[i])
            largest = warp_max(largest)
            for i in cutlass.range_constexpr(self.per_lane):
                rX[i] = cute.math.exp(rX[i] - largest)
                total += rX[i]
            total = cute.arch.warp_reduction_sum(total)
            inverse = cute.arch.rcp_approx(total)
            for i in cutlass.range_constexpr(self.per_lane):
                rX[i] = rX[i] * inverse
        return largest, total
