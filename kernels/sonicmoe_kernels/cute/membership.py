"""Step 1 of building a plan: which token is on which expert, as bits, and how many are.

    mBits[b, e, w] bit i: token 256 b + 32 w + i chose expert e
    mChosen[b, e]: how many tokens of block b chose expert e

For token rounding also, of every score, an integer that ranks like it (score_keys.py), expert-major
so that the next step reads rows, and how many tokens of a block could be added to an expert.

Legend
    T tokens, E experts, K experts per token
    b: block of 256 tokens, B of them; w: word of 32 tokens, 8 in a block; S: E or more, see below
"""

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Int32, Int64, Uint32, const_expr

from sonicmoe_kernels.cute.score_keys import MINUS_INFINITY_KEY, key_of
from sonicmoe_kernels.tiles import (
    BITS,
    BLOCK_WORDS,
    TOKEN_BLOCK,
    RoutingKernel,
    count_columns,
)

THREADS = TOKEN_BLOCK  # a token each
TILE_EXPERTS = 32  # experts whose scores one CTA transposes
PITCH = (
    TILE_EXPERTS + 1
)  # of a token's scores in shared memory: reading columns meets no bank twice


class Membership:
    """A CTA for each block of tokens; with rounding one for each 32 experts of a block.

    Reads 8TK bytes of ids and writes TE/8 of bits and 4BS of counts; with rounding also reads 4TE
    of scores, the ids again for every 32 experts, and writes 4TE of keys. The bits are gathered by
    atomic OR in shared memory, where order has no effect. mChosen and mAddable have S columns, E
    rounded up to a multiple of 4 (16-byte loads); those beyond E are 0. mKeys has 256 B columns;
    tokens beyond T have the key of -inf.
    """

    def __init__(self, spec: RoutingKernel):
        self.E = spec.num_experts
        self.K = spec.top_k
        self.rounded = spec.rounding is not None
        self.columns = count_columns(spec.num_experts)
        self.experts = TILE_EXPERTS if self.rounded else self.columns  # of one CTA

    @cute.jit
    def __call__(
        self,
        mIds_TK: cute.Tensor,
        mScores_TE: cute.Tensor | None,
        mBits: cute.Tensor,
        mChosen: cute.Tensor,
        mAddable: cute.Tensor | None,
        mKeys: cute.Tensor | None,
        stream: CUstream,
    ):
        warps = THREADS // BITS

        @cute.struct
        class Storage:
            bits: cute.struct.MemRange[Int32, self.experts * BLOCK_WORDS]
            addable: cute.struct.MemRange[Int32, TILE_EXPERTS]
            keys: cute.struct.MemRange[Int32, warps * BITS * PITCH if self.rounded else 1]

        self.Storage = Storage
        self.kernel(mIds_TK, mScores_TE, mBits, mChosen, mAddable, mKeys).launch(
            grid=[mBits.shape[0], (self.E + self.experts - 1) // self.experts, 1],
            block=[THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mIds_TK: cute.Tensor,
        mScores_TE: cute.Tensor | None,
        mBits: cute.Tensor,
        mChosen: cute.Tensor,
        mAddable: cute.Tensor | None,
        mKeys: cute.Tensor | None,
    ):
        thread = cute.arch.thread_idx()[0]
        block, part, _ = cute.arch.block_idx()
        first = part * self.experts
        storage = cutlass.memory.SmemAllocator().allocate(self.Storage)
        sBits = storage.bits.get_tensor(cute.make_layout(self.experts * BLOCK_WORDS))
        for i in cutlass.range(thread, self.experts * BLOCK_WORDS, THREADS):
            sBits[i] = Int32(0)
        sAddable = storage.addable.get_tensor(cute.make_layout(TILE_EXPERTS))
        if thread < TILE_EXPERTS:
            sAddable[thread] = Int32(0)
        cute.arch.sync_threads()
        self.mark_choices(mIds_TK, block, first, sBits)
        cute.arch.sync_threads()
        if const_expr(self.rounded):
            warps = THREADS // BITS
            sKeys = storage.keys.get_tensor(cute.make_layout((PITCH, BITS, warps)))
            self.transpose_scores(mScores_TE, mKeys, block, first, sBits, sAddable, sKeys)
            cute.arch.sync_threads()
        for i in cutlass.range(thread, self.experts * BLOCK_WORDS, THREADS):
            if first + i // BLOCK_WORDS < self.E:
                mBits[block, first + i // BLOCK_WORDS, i % BLOCK_WORDS] = sBits[i]
        for e in cutlass.range(thread, cutlass.min(self.experts, self.columns - first), THREADS):
            chosen = Int32(0)
            for w in cutlass.range_constexpr(BLOCK_WORDS):
                chosen += cute.arch.popc(sBits[e * BLOCK_WORDS + w])
            mChosen[block, first + e] = chosen
            if const_expr(self.rounded):
                mAddable[block, first + e] = sAddable[e]

    @cute.jit
    def mark_choices(self, mIds_TK: cute.Tensor, block: Int32, first: Int32, sBits: cute.Tensor):
        """Sets the bits of this block's pairs whose expert is one of this CTA's."""
        thread = cute.arch.thread_idx()[0]
        token = block * TOKEN_BLOCK + thread
        if token < mIds_TK.shape[0]:
            for k in cutlass.range_constexpr(self.K):
                expert = Int32(mIds_TK[token, k]) - first
                if expert >= 0 and expert < self.experts:
                    word = sBits.iterator + (expert * BLOCK_WORDS + thread // BITS)
                    cute.arch.atomic_or(word, Int32(Uint32(1) << Uint32(thread % BITS)))

    @cute.jit
    def transpose_scores(
        self,
        mScores_TE: cute.Tensor,
        mKeys: cute.Tensor,
        block: Int32,
        first: Int32,
        sBits: cute.Tensor,
        sAddable: cute.Tensor,
        sKeys: cute.Tensor,
    ):
        """Each warp: 32 tokens x 32 experts to keys, read along experts, written along tokens."""
        lane = cute.arch.lane_idx()
        warp = cute.arch.warp_idx()
        token = block * TOKEN_BLOCK + warp * BITS
        mScoreBits_TE = cute.recast_tensor(mScores_TE, Int32)
        for i in cutlass.range_constexpr(BITS):
            key = Int32(MINUS_INFINITY_KEY)
            if token + i < mScoreBits_TE.shape[0] and first + lane < self.E:
                key = key_of(mScoreBits_TE[Int64(token + i), first + lane])
            sKeys[lane, i, warp] = key
        cute.arch.sync_warp()
        addable = Int32(0)  # of expert `lane`
        for e in cutlass.range_constexpr(TILE_EXPERTS):
            key = sKeys[e, lane, warp]
            legal = cute.arch.vote_ballot_sync(key != MINUS_INFINITY_KEY)
            mine = sBits[e * BLOCK_WORDS + warp]
            if lane == e:
                addable = cute.arch.popc(legal & ~mine)
            if first + e < self.E:
                mKeys[Int64(first + e), token + lane] = key
        cute.arch.atomic_add(sAddable.iterator + lane, addable)
