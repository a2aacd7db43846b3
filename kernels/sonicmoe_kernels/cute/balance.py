"""Step 2 of token rounding's variant "balance": which experts go up, all experts at once.

The closed form of Alg. 6 of SonicMoE (arXiv 2512.14080), derived in rounding.py (`_balance`): the
nearest whole number of tiles of the running count, and a queue of the tiles that experts which
cannot go up leave to those after them.

Legend
    E experts, B blocks of tokens; chosen: tokens that chose an expert; addable: tokens that could
    be added to it; over: chosen modulo tile
"""

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Int32

from sonicmoe_kernels.cute.block_scan import LARGEST, WARP, block_scan
from sonicmoe_kernels.tiles import RoutingKernel, count_columns

THREADS = 1024


@cute.jit
def tiles_until(chosen: Int32, tile: Int32) -> Int32:
    """The number of tiles nearest to `chosen` rows, the lower one of two equally near."""
    return (chosen + (tile - 1) // 2) // tile


@cute.jit
def can_go_up(chosen: Int32, addable: Int32, tile: Int32) -> Int32:
    """1 if an expert's last tile is not full and enough tokens could fill it, else 0."""
    over = chosen % tile
    result = Int32(0)
    if over > 0 and tile - over <= addable:
        result = Int32(1)
    return result


@cute.jit
def debt_of(walk: Int32, lowest: Int32) -> Int32:
    """Tiles owed, given the walk of (wanted - possible) and the lowest it has been until here."""
    return walk - cutlass.min(lowest, 0)


class Balance:
    """One CTA; a thread has ceil(E / 1024) consecutive experts. Reads 8BE bytes, writes 4E."""

    def __init__(self, spec: RoutingKernel):
        self.E = spec.num_experts
        self.columns = count_columns(spec.num_experts)
        self.per_thread = -(-spec.num_experts // THREADS)

    @cute.jit
    def __call__(
        self,
        mChosen: cute.Tensor,
        mAddable: cute.Tensor,
        mGoUp_E: cute.Tensor,
        tile: Int32,
        stream: CUstream,
    ):
        @cute.struct
        class Storage:
            chosen: cute.struct.MemRange[Int32, self.columns]
            addable: cute.struct.MemRange[Int32, self.columns]
            scratch: cute.struct.MemRange[Int32, THREADS // WARP]

        self.Storage = Storage
        self.kernel(mChosen, mAddable, mGoUp_E, tile).launch(
            grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self, mChosen: cute.Tensor, mAddable: cute.Tensor, mGoUp_E: cute.Tensor, tile: Int32
    ):
        thread = cute.arch.thread_idx()[0]
        storage = cutlass.memory.SmemAllocator().allocate(self.Storage)
        sChosen = storage.chosen.get_tensor(cute.make_layout(self.columns))
        sAddable = storage.addable.get_tensor(cute.make_layout(self.columns))
        sScratch = storage.scratch.get_tensor(cute.make_layout(THREADS // WARP))
        self.sum_blocks(mChosen, sChosen)
        self.sum_blocks(mAddable, sAddable)
        cute.arch.sync_threads()

        first = thread * self.per_thread
        mine = Int32(0)
        for i in cutlass.range_constexpr(self.per_thread):
            if first + i < self.E:
                mine += sChosen[first + i]
        chosen_before, _ = block_scan(mine, sScratch, THREADS, "add")

        rWanted = cute.make_rmem_tensor(self.per_thread, Int32)  # tiles that balance would add
        rStep = cute.make_rmem_tensor(self.per_thread, Int32)
        steps = Int32(0)
        for i in cutlass.range_constexpr(self.per_thread):
            rWanted[i] = Int32(0)
            rStep[i] = Int32(0)
            if first + i < self.E:
                chosen = sChosen[first + i]
                tiles = tiles_until(chosen_before + chosen, tile) - tiles_until(chosen_before, tile)
                rWanted[i] = tiles - chosen // tile
                rStep[i] = rWanted[i] - can_go_up(chosen, sAddable[first + i], tile)
                chosen_before += chosen
            steps += rStep[i]
        walk, _ = block_scan(steps, sScratch, THREADS, "add")

        lowest = Int32(LARGEST)  # of the walk after each of this thread's experts
        until = walk
        for i in cutlass.range_constexpr(self.per_thread):
            until += rStep[i]
            lowest = cutlass.min(lowest, until)
        lowest, _ = block_scan(lowest, sScratch, THREADS, "min")
        debt = debt_of(walk, lowest)  # before the first expert: 0 - min(LARGEST, 0)
        for i in cutlass.range_constexpr(self.per_thread):
            walk += rStep[i]
            lowest = cutlass.min(lowest, walk)
            after = debt_of(walk, lowest)
            if first + i < self.E:
                go_up = Int32(0)
                if after - debt < rWanted[i]:
                    go_up = Int32(1)
                mGoUp_E[first + i] = go_up
            debt = after

    @cute.jit
    def sum_blocks(self, mCounts: cute.Tensor, sSum: cute.Tensor):
        """sSum[e] = sum of mCounts[b, e] over the blocks b; integers, so in any order."""
        thread = cute.arch.thread_idx()[0]
        for e in cutlass.range(thread, self.columns, THREADS):
            sSum[e] = Int32(0)
        cute.arch.sync_threads()
        flat = cute.make_tensor(mCounts.iterator, cute.make_layout(cute.size(mCounts)))
        for i in cutlass.range(thread, cute.size(mCounts), THREADS, unroll=4):
            cute.arch.atomic_add(sSum.iterator + i % self.columns, flat[i])
