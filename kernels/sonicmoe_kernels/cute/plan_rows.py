"""Last step of building a plan: from the membership bits to the five tensors of a RoutingPlan.

Row of (expert e, token t): where e's rows start, plus the tokens of earlier blocks on e, plus those
of t's own block before t. Nothing is sorted.

Legend
    T tokens, E experts, K experts per token, R routed rows (bound R_max)
    block: 256 tokens, B of them; word: 32 tokens, one warp; group: 32 experts
    source: where a row's score comes from: t * K + k if token t chose the expert as its k-th, -1 -
    (t * E + e) if token rounding added the pair, NO_SOURCE for rows that nobody owns
"""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from sonicmoe_kernels.cute.block_scan import (
    WARP,
    bits_below,
    block_scan,
    lowest_bit,
    transpose_bits,
)
from sonicmoe_kernels.cute.statistics import Counted, Statistics
from sonicmoe_kernels.tiles import (
    BLOCK_WORDS,
    NO_SOURCE,
    TOKEN_BLOCK,
    RoutingKernel,
    count_columns,
)

THREADS = TOKEN_BLOCK  # a token each
WARPS = THREADS // WARP
QUAD = 4  # counts of one 16-byte load


class Choices(NamedTuple):
    """What is read: every token's experts and scores, the bits, and their counts by block."""

    mIds_TK: cute.Tensor
    mScores_TK: cute.Tensor
    mScores_TE: cute.Tensor | None
    mBits: cute.Tensor
    mChosen: cute.Tensor


class Rows(NamedTuple):
    """What is written for every row, and where the rows of experts and of tokens begin."""

    mTokenIdx_R: cute.Tensor
    mScore_R: cute.Tensor
    mSource_R: cute.Tensor
    mTokenRows_R: cute.Tensor
    mExpertOffsets: cute.Tensor
    mTokenOffsets: cute.Tensor


class PlanRows:
    """A CTA for each block of tokens, a thread for each token.

    Every CTA reads all 4BE bytes of counts (from L2) instead of waiting for another launch that
    scans them, its share of TE/8 bytes of bits, 12TK of ids and scores, and writes 16 R_max + 4T.
    A warp turns 32 words of 32 experts around, so that each thread walks its own token's experts.

    statistics: more CTAs count the pass for it, who learn the experts' rows as all others do.
    """

    def __init__(self, spec: RoutingKernel, statistics: Statistics | None = None):
        self.statistics = statistics
        self.E = spec.num_experts
        self.K = spec.top_k
        self.rounded = spec.rounding is not None
        self.columns = count_columns(spec.num_experts)
        self.quads = self.columns // QUAD
        self.groups = -(-spec.num_experts // WARP)
        self.parts = max(1, THREADS // self.quads)  # threads that share the blocks of one quad
        self.turns = -(-self.quads // THREADS)
        self.per_thread = -(-self.columns // THREADS)

    @cute.jit
    def __call__(
        self,
        mIds_TK: cute.Tensor,
        mScores_TK: cute.Tensor,
        mScores_TE: cute.Tensor | None,
        mBits: cute.Tensor,
        mChosen: cute.Tensor,
        mTokenIdx_R: cute.Tensor,
        mScore_R: cute.Tensor,
        mSource_R: cute.Tensor,
        mExpertOffsets: cute.Tensor,
        mTokenOffsets: cute.Tensor,
        mTokenRows_R: cute.Tensor,
        stream: CUstream,
    ):
        choices = Choices(mIds_TK, mScores_TK, mScores_TE, mBits, mChosen)
        starts = (mExpertOffsets, mTokenOffsets)
        rows = Rows(mTokenIdx_R, mScore_R, mSource_R, mTokenRows_R, *starts)
        self.launch(choices, rows, None, Int32(0), stream)

    @cute.jit
    def launch(
        self,
        choices: Choices,
        rows: Rows,
        counted: Counted | None,
        counting_ctas: Int32,
        stream: CUstream,
    ):
        """counted, counting_ctas: what to count and by how many CTAs, STATISTICS_CTAS or none."""

        @cute.struct
        class Storage:
            bits: cute.struct.Align[
                cute.struct.MemRange[Int32, self.groups * WARP * BLOCK_WORDS], 16
            ]
            total: cute.struct.MemRange[Int32, self.columns]
            base: cute.struct.MemRange[Int32, self.columns]
            group: cute.struct.MemRange[Int32, THREADS]
            scratch: cute.struct.MemRange[Int32, WARPS]

        self.Storage = Storage
        self.kernel(choices, rows, counted).launch(
            grid=[cutlass.max(choices.mBits.shape[0], 1) + counting_ctas, 1, 1],
            block=[THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, choices: Choices, rows: Rows, counted: Counted | None):
        block = cute.arch.block_idx()[0]
        storage = cutlass.memory.SmemAllocator().allocate(self.Storage)
        if const_expr(counted is None):
            self.write_plan(choices, rows, cute.arch.grid_dim()[0], storage)
        else:
            blocks = cutlass.max(choices.mBits.shape[0], 1)
            if block < blocks:
                self.write_plan(choices, rows, blocks, storage)
            else:
                self.count(choices.mChosen, counted, block - blocks, storage)

    @cute.jit
    def write_plan(self, choices: Choices, rows: Rows, blocks: Int32, storage: Any):
        """This CTA's tokens; `blocks` CTAs do it."""
        mIds_TK, mScores_TK, mScores_TE, mBits, mChosen = choices
        mExpertOffsets, mTokenOffsets = rows.mExpertOffsets, rows.mTokenOffsets
        thread = cute.arch.thread_idx()[0]
        block = cute.arch.block_idx()[0]
        token = block * TOKEN_BLOCK + thread
        num_tokens = mIds_TK.shape[0]
        sBits = storage.bits.get_tensor(cute.make_layout(self.groups * WARP * BLOCK_WORDS))
        sTotal = storage.total.get_tensor(cute.make_layout(self.columns))
        sBase = storage.base.get_tensor(cute.make_layout(self.columns))
        sGroup = storage.group.get_tensor(cute.make_layout((WARP, WARPS)))
        sScratch = storage.scratch.get_tensor(cute.make_layout(WARPS))

        self.load_bits(mBits, block, sBits)
        self.sum_blocks(mChosen, block, sTotal, sBase)
        num_rows, earlier_rows = self.place_experts(sTotal, sBase, mExpertOffsets, sScratch)

        slot = token * self.K
        if const_expr(self.rounded):
            before, _ = block_scan(self.experts_of_token(sBits), sScratch, THREADS, "add")
            slot = earlier_rows + before
        if token < num_tokens:
            mTokenOffsets[token] = slot
        if token == 0:
            mTokenOffsets[num_tokens] = num_rows
        self.write_rows(mIds_TK, mScores_TK, mScores_TE, rows, token, slot, sBits, sBase, sGroup)
        self.write_tail(rows, token, num_rows, blocks * THREADS)

    @cute.jit
    def count(self, mChosen: cute.Tensor, counted: Counted, part: Int32, storage: Any):
        """Adds a part of the statistics."""
        sTotal = storage.total.get_tensor(cute.make_layout(self.columns))
        sBase = storage.base.get_tensor(cute.make_layout(self.columns))
        sNats = cute.make_tensor(
            cute.recast_ptr(storage.scratch.data_ptr(), dtype=Float32), cute.make_layout(WARPS)
        )
        self.sum_blocks(mChosen, Int32(0), sTotal, sBase)
        self.statistics.add(part, sTotal, sNats, counted)

    @cute.jit
    def load_bits(self, mBits: cute.Tensor, block: Int32, sBits: cute.Tensor):
        """This block's words of every expert; experts up to a whole group have none."""
        thread = cute.arch.thread_idx()[0]
        for i in cutlass.range(thread, self.groups * WARP * BLOCK_WORDS, THREADS, unroll=4):
            word = Int32(0)
            if i < self.E * BLOCK_WORDS and block < mBits.shape[0]:
                word = mBits[block, i // BLOCK_WORDS, i % BLOCK_WORDS]
            sBits[i] = word

    @cute.jit
    def sum_blocks(
        self, mChosen: cute.Tensor, block: Int32, sTotal: cute.Tensor, sBefore: cute.Tensor
    ):
        """Each expert's rows: of all blocks, and of those before this one."""
        thread = cute.arch.thread_idx()[0]
        for i in cutlass.range(thread, self.columns, THREADS):
            sTotal[i] = Int32(0)
            sBefore[i] = Int32(0)
        cute.arch.sync_threads()
        rTotal = cute.make_rmem_tensor(QUAD, Int32)
        rBefore = cute.make_rmem_tensor(QUAD, Int32)
        rCounts = cute.make_rmem_tensor(QUAD, Int32)
        for turn in cutlass.range_constexpr(self.turns):
            rTotal.fill(0)
            rBefore.fill(0)
            quad = thread + turn * THREADS
            part = Int32(0)
            if const_expr(self.parts > 1):
                quad = thread % self.quads
                part = thread // self.quads
            if quad < self.quads and part < self.parts:
                for b in cutlass.range(part, mChosen.shape[0], self.parts, unroll=8):
                    offset = cute.assume(b * self.columns + quad * QUAD, divby=QUAD)
                    source = cute.make_tensor(mChosen.iterator + offset, cute.make_layout(QUAD))
                    cute.autovec_copy(source, rCounts)
                    for i in cutlass.range_constexpr(QUAD):
                        rTotal[i] += rCounts[i]
                        if b < block:
                            rBefore[i] += rCounts[i]
                for i in cutlass.range_constexpr(QUAD):
                    cute.arch.atomic_add(sTotal.iterator + (quad * QUAD + i), rTotal[i])
                    cute.arch.atomic_add(sBefore.iterator + (quad * QUAD + i), rBefore[i])
        cute.arch.sync_threads()

    @cute.jit
    def place_experts(
        self,
        sTotal: cute.Tensor,
        sBase: cute.Tensor,
        mExpertOffsets: cute.Tensor,
        sScratch: cute.Tensor,
    ):
        """Adds where each expert starts to sBase; (all rows, rows of earlier blocks' tokens)."""
        thread = cute.arch.thread_idx()[0]
        first = thread * self.per_thread
        mine, mine_before = Int32(0), Int32(0)
        for i in cutlass.range_constexpr(self.per_thread):
            if first + i < self.columns:
                mine += sTotal[first + i]
                mine_before += sBase[first + i]
        start, num_rows = block_scan(mine, sScratch, THREADS, "add")
        _, earlier_rows = block_scan(mine_before, sScratch, THREADS, "add")
        for i in cutlass.range_constexpr(self.per_thread):
            if first + i < self.columns:
                sBase[first + i] += start
                if cute.arch.block_idx()[0] == 0 and first + i < self.E:
                    mExpertOffsets[first + i] = start
                start += sTotal[first + i]
        if cute.arch.block_idx()[0] == 0 and thread == 0:
            mExpertOffsets[self.E] = num_rows
        cute.arch.sync_threads()
        return num_rows, earlier_rows

    @cute.jit
    def experts_of_token(self, sBits: cute.Tensor) -> Int32:
        """How many experts this thread's token is on."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        count = Int32(0)
        for group in cutlass.range(self.groups, unroll=4):
            word = sBits[(group * WARP + lane) * BLOCK_WORDS + warp]
            count += Int32(cute.arch.popc(transpose_bits(Uint32(word))))
        return count

    @cute.jit
    def write_rows(
        self,
        mIds_TK: cute.Tensor,
        mScores_TK: cute.Tensor,
        mScores_TE: cute.Tensor | None,
        rows: Rows,
        token: Int32,
        slot: Int32,
        sBits: cute.Tensor,
        sBase: cute.Tensor,
        sGroup: cute.Tensor,
    ):
        """Writes the rows of this thread's token, of ascending expert."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        rIds = cute.make_rmem_tensor(self.K, Int32)
        for k in cutlass.range_constexpr(self.K):
            rIds[k] = Int32(-1)
            if token < mIds_TK.shape[0]:
                rIds[k] = Int32(mIds_TK[token, k])
        for group in cutlass.range(self.groups):
            expert = group * WARP + lane
            first_row = Int32(0)  # of this warp's tokens on `expert`
            if expert < self.E:
                first_row = sBase[expert]
            mine = Int32(0)
            for w in cutlass.range_constexpr(BLOCK_WORDS):
                other = sBits[expert * BLOCK_WORDS + w]
                if w < warp:
                    first_row += cute.arch.popc(other)
                if w == warp:
                    mine = other
            cute.arch.sync_warp()  # everyone is done with the group before
            sGroup[lane, warp] = first_row
            cute.arch.sync_warp()
            left = transpose_bits(Uint32(mine))  # the token's experts of this group
            while left != Uint32(0):
                bit = lowest_bit(left)
                left = left & (left - Uint32(1))
                expert = group * WARP + bit
                word = Uint32(sBits[expert * BLOCK_WORDS + warp])
                row = sGroup[bit, warp] + Int32(cute.arch.popc(word & bits_below(lane)))
                self.write_row(mScores_TK, mScores_TE, rows, token, expert, row, rIds)
                rows.mTokenRows_R[slot] = row
                slot += 1

    @cute.jit
    def write_row(
        self,
        mScores_TK: cute.Tensor,
        mScores_TE: cute.Tensor | None,
        rows: Rows,
        token: Int32,
        expert: Int32,
        row: Int32,
        rIds: cute.Tensor,
    ):
        choice = Int32(self.K)
        for k in cutlass.range_constexpr(self.K):
            if rIds[k] == expert:
                choice = Int32(k)
        source = token * self.K + choice
        score = Float32(0.0)
        if choice < self.K:
            score = mScores_TK[token, choice]
        else:
            if const_expr(self.rounded):
                source = -1 - (token * self.E + expert)
                score = mScores_TE[Int64(token), expert]
        rows.mTokenIdx_R[row] = token
        rows.mScore_R[row] = score
        rows.mSource_R[row] = source

    @cute.jit
    def write_tail(self, rows: Rows, thread: Int32, num_rows: Int32, threads: Int32):
        """Rows that nobody owns: token 0, score 0, no source; token_rows stays in range."""
        for row in cutlass.range(num_rows + thread, rows.mTokenIdx_R.shape[0], threads):
            rows.mTokenIdx_R[row] = Int32(0)
            rows.mScore_R[row] = Float32(0.0)
            rows.mSource_R[row] = Int32(NO_SOURCE)
            rows.mTokenRows_R[row] = row
