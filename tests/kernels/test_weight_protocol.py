"""The weight gradients' consumers: their own code on a machine that runs warps in random order."""

import os

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

from functools import partial

import pytest

pytest.importorskip("cutlass")
import cutlass.cute as cute
from sonicmoe_kernels.cute.grouped_gemm_k import (
    CONSUMERS,
    ROWS,
    SLAB,
    STORE_BUFFERS,
    WARPGROUP,
    GroupedGemmK,
)
from sonicmoe_kernels.tiles import TILE_K, WeightGemm, WeightTile, why_illegal_weights

from tests.kernels.symbols import FRAGMENT
from tests.kernels.warps import check_seeds
from tests.kernels.weight_machine import WeightMachine

COUNTS = (0, 1, 15, 16, 17, 63, 64, 65, 128, 129, 200, 255, 256, 257, 300, 385)
GEMMS = [  # half an m tile, one n tile of two halves; an odd number of slabs, two n tiles; one slab
    WeightGemm("d_weight13", 320, 128, 2, "bfloat16", WeightTile(256, 3, 1)),
    WeightGemm("d_weight2", 192, 320, 1, "bfloat16", WeightTile(192, 2, 1)),
    WeightGemm("d_weight2", 128, 64, 1, "bfloat16", WeightTile(64, 2, 1)),
    WeightGemm("d_weight13", 320, 128, 2, "bfloat16", WeightTile(256, 3, 1, short_end=True)),
    WeightGemm("d_weight2", 192, 320, 1, "bfloat16", WeightTile(192, 2, 1, short_end=True)),
]


def label(gemm):
    ends = "-short" * gemm.tile.short_end
    return f"{gemm.kernel}-{gemm.tile.tile_n}-{gemm.tile.stages}{ends}"


def expected(gemm, machine):
    """{(half, 64 rows of D, slab, expert): whose sums, of which unit, k tiles, blocks, column}."""
    slabs = gemm.tile.tile_n // SLAB
    found = {}
    for slot, expert in enumerate(machine.order):
        rows = machine.offsets[expert + 1] - machine.offsets[expert]
        k_tiles = max(-(-rows // TILE_K), 1)
        # A k tile that slabs are stored under is multiplied whole.
        short = gemm.tile.short_end and k_tiles > slabs
        blocks = -(-rows // 16) if short else k_tiles * TILE_K // 16
        for row in range(-(-gemm.d // ROWS)):
            for slab in range(gemm.n // SLAB):
                half, column = divmod(slab, gemm.f // SLAB)
                n, c = divmod(slab, slabs)
                unit = (slot * gemm.m_units + row // CONSUMERS) * gemm.n_tiles + n
                sums = ("sum", row % CONSUMERS, unit, k_tiles, blocks, c * FRAGMENT)
                found[half, row, column, expert] = [sums] * 4
    return found


def check(gemm, counts, ctas, seed):
    """One interleaving: no deadlock, no hazard, every slab stored once with its own sums."""
    machine = WeightMachine(gemm, counts, ctas, seed)
    machine.run()
    assert machine.outputs == expected(gemm, machine)


@pytest.mark.parametrize("gemm", GEMMS, ids=label)
def test_every_interleaving_stores_every_slab_once(gemm):
    assert why_illegal_weights(gemm) is None
    check_seeds(partial(check, gemm), str(gemm), COUNTS, 4)


def test_more_ctas_than_units_end_as_well():
    check(GEMMS[0], [65, 0], 9, 0)


def test_the_machine_notices_a_slab_that_is_held_twice(monkeypatch):
    def hold_the_first(self, rSum, rSlab, c):
        rWords = cute.recast_tensor(rSlab, None)
        for i in range(cute.size(rWords)):
            rWords[i] = (rSum[2 * i], rSum[2 * i + 1])

    monkeypatch.setattr(GroupedGemmK, "hold_slab", hold_the_first)
    with pytest.raises(AssertionError):
        check(GEMMS[0], [65, 300], 1, 0)


def test_the_machine_notices_a_block_of_rows_that_is_left_out(monkeypatch):
    monkeypatch.setattr(GroupedGemmK, "last_blocks", lambda self, rows, k_tiles: 2)
    with pytest.raises(AssertionError):
        check(GEMMS[3], [300, 300], 1, 0)


def test_the_machine_notices_buffers_that_nobody_waits_for(monkeypatch):
    def unwaited(self, out, work, c):
        buffer = out.consumer * STORE_BUFFERS + c % STORE_BUFFERS
        cute.copy(out.copy, out.held[c], out.tRsOut[None, None, None, buffer])
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=0, number_of_threads=WARPGROUP)
        slab = work.n * (self.tile_n // SLAB) + c
        self.store_slab(out.stores, out.sOut, buffer, work, out.consumer, slab)

    monkeypatch.setattr(GroupedGemmK, "put_slab", unwaited)
    with pytest.raises(AssertionError, match="was overwritten before its store had read it"):
        for seed in range(10):
            check(GEMMS[0], [65, 300], 1, seed)
