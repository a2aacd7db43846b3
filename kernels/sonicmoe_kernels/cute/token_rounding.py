"""Step 2 of token rounding (3 of "balance"): drops an expert's worst tokens or adds others.

After Alg. 4 of SonicMoE (arXiv 2512.14080); rounding.py says what the variants mean. Nothing is
sorted: the `count` best of an expert's candidates are those above a threshold, found by histograms
over a range that shrinks, and of the candidates equal to it those of the lowest tokens.

Legend
    E experts, T tokens, B blocks of 256 tokens, w word of 32 tokens
    f: tokens that chose the expert; over: f modulo tile
    key: a score as an integer (score_keys.py); bin: keys of one entry of a histogram
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Boolean, Float32, Float64, Int32, Int64, Uint32, const_expr

from sonicmoe_kernels.cute.balance import can_go_up
from sonicmoe_kernels.cute.block_scan import WARP, bits_below, block_scan, lowest_bit
from sonicmoe_kernels.cute.score_keys import (
    HIGHEST_KEY,
    LOWEST_KEY,
    MINUS_INFINITY_KEY,
    score_of,
)
from sonicmoe_kernels.tiles import BITS, BLOCK_WORDS, TOKEN_BLOCK, RoutingKernel

THREADS = 1024
WARPS = THREADS // WARP
BIN_BITS = 11
BINS = 1 << BIN_BITS  # two for each thread; three rounds cover all 32 bits of a key
BINS_PER_THREAD = BINS // THREADS
STOCHASTIC = ("stochastic", "score_stochastic")


class Row(NamedTuple):
    """One expert's share of the inputs, and which blocks of tokens this warp looks at."""

    mKeys: cute.Tensor
    mBits: cute.Tensor
    expert: Int32
    first_block: Int32
    end_block: Int32


class Best(NamedTuple):
    """The best candidates: all above `key`, and the first `equals` of the `all_equals` equal ones.

    With no candidate wanted, key is above every key and nothing is equal to it.
    """

    key: Int32
    equals: Int32
    all_equals: Int32


@cute.jit
def shift_of(low: Int32, high: Int32) -> Uint32:
    """How many bits of a key one bin covers when the bins cover the keys from low to high."""
    span = Uint32(high) - Uint32(low)
    shift = Uint32(0)
    while (span >> shift) >= Uint32(BINS):
        shift += Uint32(1)
    return shift


@cute.jit
def bin_of(key: Int32, low: Int32, shift: Uint32) -> Int32:
    return Int32((Uint32(key) - Uint32(low)) >> shift)


@cute.jit
def is_candidate(key: Int32, word: Int32, lane: Int32, chosen: Boolean) -> Boolean:
    """Whether a token stands for election: among those who chose, or among those to add."""
    member = ((Uint32(word) >> Uint32(lane)) & Uint32(1)) == Uint32(1)
    return (chosen and member) or (not chosen and not member and key != MINUS_INFINITY_KEY)


class TokenRounding:
    """One CTA for each expert; a warp looks at whole blocks of tokens, lane i at token i of a word.

    Reads 4T bytes of keys about six times (the first time from L2, then mostly from L1) and T/8 of
    bits, writes the bits and 4B of counts of an expert that changes, in place, and f where somebody
    asks for it. Atomics count in shared memory only, in integers. Sums of scores are taken in
    float64 in a fixed order.
    """

    def __init__(self, spec: RoutingKernel):
        self.rounding = spec.rounding

    @cute.jit
    def __call__(
        self,
        mKeys: cute.Tensor,
        mBits: cute.Tensor,
        mChosen: cute.Tensor,
        mAddable: cute.Tensor,
        mUniform_E: cute.Tensor | None,
        mGoUp_E: cute.Tensor | None,
        tile: Int32,
        stream: CUstream,
    ):
        self.launch(mKeys, mBits, mChosen, mAddable, mUniform_E, mGoUp_E, None, tile, stream)

    def launch(self, mKeys, mBits, mChosen, mAddable, mUniform_E, mGoUp_E, mBefore_E, tile, stream):
        """mBefore_E, where given, gets every expert's f."""

        @cute.struct
        class Storage:
            histogram: cute.struct.MemRange[Int32, BINS]
            scratch: cute.struct.MemRange[Int32, WARPS]
            found: cute.struct.MemRange[Int32, 3]
            sums: cute.struct.MemRange[Float64, WARPS]

        self.Storage = Storage
        self.kernel(mKeys, mBits, mChosen, mAddable, mUniform_E, mGoUp_E, mBefore_E, tile).launch(
            grid=[mBits.shape[1], 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mKeys: cute.Tensor,
        mBits: cute.Tensor,
        mChosen: cute.Tensor,
        mAddable: cute.Tensor,
        mUniform_E: cute.Tensor | None,
        mGoUp_E: cute.Tensor | None,
        mBefore_E: cute.Tensor | None,
        tile: Int32,
    ):
        expert = cute.arch.block_idx()[0]
        warp = cute.arch.warp_idx()
        storage = cutlass.memory.SmemAllocator().allocate(self.Storage)
        sHistogram = storage.histogram.get_tensor(cute.make_layout(BINS))
        sScratch = storage.scratch.get_tensor(cute.make_layout(WARPS))
        sFound = storage.found.get_tensor(cute.make_layout(3))
        sSums = storage.sums.get_tensor(cute.make_layout(WARPS))
        blocks = mBits.shape[0]
        per_warp = (blocks + WARPS - 1) // WARPS
        end_block = cutlass.min(blocks, (warp + 1) * per_warp)
        row = Row(mKeys, mBits, expert, warp * per_warp, end_block)

        f = self.sum_blocks(mChosen, expert, sScratch)
        addable = self.sum_blocks(mAddable, expert, sScratch)
        if const_expr(mBefore_E is not None):
            self.store_once(mBefore_E, expert, f)
        over = f % tile
        down = f - over
        go_up = Boolean(False)
        if can_go_up(f, addable, tile) == 1:
            if const_expr(self.rounding == "nearest"):
                go_up = 2 * over > tile
            if const_expr(self.rounding == "stochastic"):
                go_up = mUniform_E[expert] * Float32(tile) < Float32(over)
            if const_expr(self.rounding == "score_stochastic"):
                kept = self.find_best(row, Boolean(True), down, sHistogram, sScratch, sFound)
                new = self.find_best(row, Boolean(False), tile - over, sHistogram, sScratch, sFound)
                dropped, _ = self.sum_scores(row, Boolean(True), kept, sSums)
                _, added = self.sum_scores(row, Boolean(False), new, sSums)
                go_up = Float64(mUniform_E[expert]) * (dropped + added) < dropped
            if const_expr(self.rounding == "balance"):
                go_up = mGoUp_E[expert] == 1
            if const_expr(self.rounding == "up"):
                go_up = Boolean(True)
        if over > 0:
            count = down
            if go_up:
                count = tile - over
            best = self.find_best(row, not go_up, count, sHistogram, sScratch, sFound)
            self.update(row, not go_up, best, mChosen, sScratch)

    @cute.jit
    def store_once(self, mValue_E: cute.Tensor, expert: Int32, value: Int32):
        if cute.arch.thread_idx()[0] == 0:
            mValue_E[expert] = value

    @cute.jit
    def sum_blocks(self, mCounts: cute.Tensor, expert: Int32, sScratch: cute.Tensor) -> Int32:
        """The sum of mCounts[b, expert] over all blocks b, in every thread."""
        mine = Int32(0)
        for b in cutlass.range(cute.arch.thread_idx()[0], mCounts.shape[0], THREADS):
            mine += mCounts[b, expert]
        _, total = block_scan(mine, sScratch, THREADS, "add")
        return total

    @cute.jit
    def load_block(self, row: Row, block: Int32, rKeys: cute.Tensor, rWords: cute.Tensor):
        """A block's keys of this lane, and its words of bits (the same in every lane)."""
        token = block * TOKEN_BLOCK + cute.arch.lane_idx()
        for w in cutlass.range_constexpr(BLOCK_WORDS):
            rKeys[w] = row.mKeys[Int64(row.expert), token + w * BITS]
            rWords[w] = row.mBits[block, row.expert, w]

    @cute.jit
    def find_best(
        self,
        row: Row,
        chosen: Boolean,
        count: Int32,
        sHistogram: cute.Tensor,
        sScratch: cute.Tensor,
        sFound: cute.Tensor,
    ):
        """The `count` best of the candidates, of which there are at least as many."""
        key, equals, all_equals = Int32(HIGHEST_KEY), Int32(0), Int32(0)
        if count > 0:
            low, high = self.range_of_keys(row, chosen, sScratch)
            equals = count
            searching = Boolean(True)
            while searching:
                shift = shift_of(low, high)
                self.count_bins(row, chosen, low, high, shift, sHistogram)
                self.find_bin(equals, sHistogram, sScratch, sFound)
                low = Int32(Uint32(low) + (Uint32(sFound[0]) << shift))
                equals = sFound[1]
                all_equals = sFound[2]
                searching = shift > Uint32(0)
                high = Int32(Uint32(low) + (Uint32(1) << shift) - Uint32(1))
                cute.arch.sync_threads()
            key = low
        return Best(key, equals, all_equals)

    @cute.jit
    def range_of_keys(self, row: Row, chosen: Boolean, sScratch: cute.Tensor):
        """The lowest and the highest key of the candidates."""
        lane = cute.arch.lane_idx()
        rKeys = cute.make_rmem_tensor(BLOCK_WORDS, Int32)
        rWords = cute.make_rmem_tensor(BLOCK_WORDS, Int32)
        low, high = Int32(HIGHEST_KEY), Int32(LOWEST_KEY)
        for b in cutlass.range(row.first_block, row.end_block):
            self.load_block(row, b, rKeys, rWords)
            for w in cutlass.range_constexpr(BLOCK_WORDS):
                if is_candidate(rKeys[w], rWords[w], lane, chosen):
                    low = cutlass.min(low, rKeys[w])
                    high = cutlass.max(high, rKeys[w])
        _, low = block_scan(low, sScratch, THREADS, "min")
        _, negative = block_scan(~high, sScratch, THREADS, "min")  # ~ turns the order around
        return low, ~negative

    @cute.jit
    def count_bins(
        self,
        row: Row,
        chosen: Boolean,
        low: Int32,
        high: Int32,
        shift: Uint32,
        sHistogram: cute.Tensor,
    ):
        """Counts the candidates with keys from low to high by bin.

        Where all of a warp's meet in one bin they are counted at once: adding to one address 32
        times takes 32 turns, and routers like to give many tokens the same score.
        """
        lane = cute.arch.lane_idx()
        for i in cutlass.range_constexpr(BINS_PER_THREAD):
            sHistogram[cute.arch.thread_idx()[0] + i * THREADS] = Int32(0)
        cute.arch.sync_threads()
        rKeys = cute.make_rmem_tensor(BLOCK_WORDS, Int32)
        rWords = cute.make_rmem_tensor(BLOCK_WORDS, Int32)
        for b in cutlass.range(row.first_block, row.end_block):
            self.load_block(row, b, rKeys, rWords)
            for w in cutlass.range_constexpr(BLOCK_WORDS):
                key = rKeys[w]
                counts = is_candidate(key, rWords[w], lane, chosen) and key >= low and key <= high
                voters = cute.arch.vote_ballot_sync(counts)
                if voters != 0:
                    bin = bin_of(key, low, shift)
                    leader = lowest_bit(Uint32(voters))
                    same = bin == cute.arch.shuffle_sync(bin, leader)
                    if cute.arch.vote_all_sync(same or not counts):
                        if lane == leader:
                            cute.arch.atomic_add(sHistogram.iterator + bin, cute.arch.popc(voters))
                    else:
                        if counts:
                            cute.arch.atomic_add(sHistogram.iterator + bin, Int32(1))
        cute.arch.sync_threads()

    @cute.jit
    def find_bin(
        self, count: Int32, sHistogram: cute.Tensor, sScratch: cute.Tensor, sFound: cute.Tensor
    ):
        """sFound = the bin of the count-th best, its place among those in it, how many they are."""
        thread = cute.arch.thread_idx()[0]
        mine = Int32(0)
        for i in cutlass.range_constexpr(BINS_PER_THREAD):
            mine += sHistogram[BINS - 1 - (thread * BINS_PER_THREAD + i)]
        above, _ = block_scan(mine, sScratch, THREADS, "add")
        for i in cutlass.range_constexpr(BINS_PER_THREAD):
            bin = BINS - 1 - (thread * BINS_PER_THREAD + i)
            inside = sHistogram[bin]
            if above < count and count <= above + inside:
                sFound[0] = Int32(bin)
                sFound[1] = count - above
                sFound[2] = inside
            above += inside
        cute.arch.sync_threads()

    @cute.jit
    def sum_scores(self, row: Row, chosen: Boolean, best: Best, sSums: cute.Tensor):
        """(sum of the scores of the candidates that are not among the best, sum of the best)."""
        lane = cute.arch.lane_idx()
        rKeys = cute.make_rmem_tensor(BLOCK_WORDS, Int32)
        rWords = cute.make_rmem_tensor(BLOCK_WORDS, Int32)
        below, above = Float64(0.0), Float64(0.0)
        for b in cutlass.range(row.first_block, row.end_block):
            self.load_block(row, b, rKeys, rWords)
            for w in cutlass.range_constexpr(BLOCK_WORDS):
                if is_candidate(rKeys[w], rWords[w], lane, chosen):
                    score = Float64(score_of(rKeys[w]))
                    if rKeys[w] > best.key:
                        above += score
                    if rKeys[w] < best.key:
                        below += score
        below = self.sum_over_block(below, sSums)
        above = self.sum_over_block(above, sSums)
        if best.equals > 0:
            above += Float64(best.equals) * Float64(score_of(best.key))
        if best.all_equals > best.equals:
            below += Float64(best.all_equals - best.equals) * Float64(score_of(best.key))
        return below, above

    @cute.jit
    def sum_over_block(self, value: Float64, sSums: cute.Tensor) -> Float64:
        """The sum of all threads' values, in a fixed order."""
        for step in cutlass.range_constexpr(5):
            value += cute.arch.shuffle_sync_bfly(value, 1 << step)
        if cute.arch.lane_idx() == 0:
            sSums[cute.arch.warp_idx()] = value
        cute.arch.sync_threads()
        total = Float64(0.0)
        for warp in cutlass.range_constexpr(WARPS):
            total += sSums[warp]
        cute.arch.sync_threads()
        return total

    @cute.jit
    def update(
        self,
        row: Row,
        chosen: Boolean,
        best: Best,
        mChosen: cute.Tensor,
        sScratch: cute.Tensor,
    ):
        """Keeps only the best of those who chose the expert, or adds the best of the others."""
        lane = cute.arch.lane_idx()
        rKeys = cute.make_rmem_tensor(BLOCK_WORDS, Int32)
        rWords = cute.make_rmem_tensor(BLOCK_WORDS, Int32)
        mine = Int32(0)  # equal candidates of this warp
        for b in cutlass.range(row.first_block, row.end_block):
            self.load_block(row, b, rKeys, rWords)
            for w in cutlass.range_constexpr(BLOCK_WORDS):
                candidate = is_candidate(rKeys[w], rWords[w], lane, chosen)
                equal = cute.arch.vote_ballot_sync(candidate and rKeys[w] == best.key)
                if lane == 0:
                    mine += cute.arch.popc(equal)
        before, _ = block_scan(mine, sScratch, THREADS, "add")
        before = cute.arch.shuffle_sync(before, 0)
        for b in cutlass.range(row.first_block, row.end_block):
            self.load_block(row, b, rKeys, rWords)
            rows = Int32(0)
            new = Int32(0)  # word `lane` of the block
            for w in cutlass.range_constexpr(BLOCK_WORDS):
                candidate = is_candidate(rKeys[w], rWords[w], lane, chosen)
                equal = candidate and rKeys[w] == best.key
                equals = cute.arch.vote_ballot_sync(equal)
                place = before + cute.arch.popc(equals & Int32(bits_below(lane)))
                taken = (candidate and rKeys[w] > best.key) or (equal and place < best.equals)
                word = cute.arch.vote_ballot_sync(taken)
                if not chosen:
                    word = word | rWords[w]
                before += cute.arch.popc(equals)
                rows += cute.arch.popc(word)
                if lane == w:
                    new = word
            if lane < BLOCK_WORDS:
                row.mBits[b, row.expert, lane] = new
            if lane == 0:
                mChosen[b, row.expert] = rows
