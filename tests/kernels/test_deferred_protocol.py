"""The deferred kernels' protocol: their own code on a machine that runs warps in random order."""

import os

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import itertools
from functools import partial

import pytest

pytest.importorskip("cutlass")
from sonicmoe_kernels.cute.d_hidden import DHidden
from sonicmoe_kernels.cute.grouped_gemm_m import GroupedGemmM
from sonicmoe_kernels.tiles import WARPGROUP_ROWS, RowGemm, RowTile, why_illegal

from tests.kernels.deferred_machine import DeferredMachine, block_values
from tests.kernels.relayed_machine import SLICE_ROWS
from tests.kernels.symbols import FRAGMENT, Symbol, activate, differentiate
from tests.kernels.warps import check_seeds

ROWS = (0, 1, 15, 16, 17, 48, 63, 64, 65, 127, 128, 129, 191, 193, 256, 257, 300, 385)
GEMMS = [
    RowGemm("up", 192, 64, 3, "bfloat16", "swiglu", RowTile(128, 3, "deferred")),
    RowGemm("up", 256, 192, 3, "bfloat16", "silu", RowTile(128, 2, "deferred")),
    RowGemm(
        "d_hidden", 256, 128, 3, "bfloat16", "swiglu", RowTile(128, 2, "deferred", load_sets=2)
    ),
    RowGemm("d_hidden", 320, 192, 3, "float16", "relu2", RowTile(128, 3, "deferred", load_sets=4)),
]


def label(gemm):
    return f"{gemm.kernel}-{gemm.activation}-{gemm.tile.tile_n}x{gemm.n_tiles}-{gemm.tile.stages}"


def sums(gemm, row, n, source, chunk):
    """A fragment of the sums of a block that begins at `row`."""
    first = (source * gemm.n_step + chunk * gemm.tile.epi_n) // 2
    return [Symbol(("sum", row, n, first + i)) for i in range(FRAGMENT)]


def finished(gemm, first, row, rows, column):
    """({(tensor, half): a fragment's values}, its share of dS by row) of a block's chunk."""
    n, chunk = divmod(column, gemm.epi_chunks)
    held = [sums(gemm, first + row, n, source, chunk) for source in range(gemm.n_sources)]
    if gemm.kernel == "up":
        values = {("H", half): held[half] for half in range(gemm.halves)}
        pairs = zip(*held, strict=True)
        values["A", 0] = [activate(gemm.activation, pair) for pair in pairs]
        return values, None
    columns = [block_values(first + row, column, half) for half in range(gemm.halves)]
    values = {("dH", half): [] for half in range(gemm.halves)} | {("A", 0): []}
    shares = []
    for i, da in enumerate(held[0]):
        score = Symbol(("score", first + min(row + i // 2 % 2 * 8, rows - 1)))
        gradients = differentiate(gemm.activation, tuple(h[i] for h in columns), score * da)
        for half, dh in enumerate(gradients.dh):
            values["dH", half].append(dh)
        values["A", 0].append(score * gradients.a)
        shares.append(da * gradients.a)
    return values, shares


def expected(gemm, offsets):
    outputs, d_scores = {}, {}
    for first, end in itertools.pairwise(offsets):
        rows = end - first
        for row in range(0, rows, WARPGROUP_ROWS):
            for n in range(gemm.n_tiles):
                total = [0.0, 0.0]
                for column in range(n * gemm.epi_chunks, (n + 1) * gemm.epi_chunks):
                    values, shares = finished(gemm, first, row, rows, column)
                    for i, share in enumerate(shares or ()):
                        total[i // 2 % 2] = total[i // 2 % 2] + share
                    if column * gemm.tile.epi_n >= gemm.f:
                        continue
                    for (name, half), fragment in values.items():
                        for r in range(row, min(row + WARPGROUP_ROWS, rows)):
                            part = (r - row) // SLICE_ROWS
                            cell = tuple(Symbol((part, *v)) for v in fragment)
                            outputs[name, first + r, column, half] = cell
                if gemm.kernel == "d_hidden":
                    d_scores[n, first + row] = tuple(total)
    return outputs, d_scores


def check(gemm, counts, clusters, seed):
    """One interleaving: no deadlock, no hazard, every output stored once with its own values."""
    machine = DeferredMachine(gemm, counts, clusters, seed)
    machine.run()
    outputs, d_scores = expected(gemm, machine.offsets)
    assert machine.outputs == outputs
    assert machine.d_scores == d_scores


@pytest.mark.parametrize("gemm", GEMMS, ids=label)
def test_every_interleaving_stores_every_value_once(gemm):
    assert why_illegal(gemm) is None
    check_seeds(partial(check, gemm), label(gemm), ROWS, gemm.num_experts)


@pytest.mark.parametrize("gemm", GEMMS, ids=label)
def test_the_machine_notices_buffers_that_nobody_waits_for(gemm, monkeypatch):
    def sync_alone(self, memory):
        self.sync_warpgroup(memory)

    monkeypatch.setattr(GroupedGemmM, "wait_for_buffers", sync_alone)
    with pytest.raises(AssertionError, match="was overwritten before its store had read it"):
        for seed in range(20):
            check(gemm, [64, 128, 300], 1, seed)


def test_the_machine_notices_h_that_comes_for_a_chunk_of_the_tile_before(monkeypatch):
    def first_of_all(self, memory, load_set):
        return memory.barriers + memory.group * self.tile.load_sets

    monkeypatch.setattr(DHidden, "load_barrier", first_of_all)
    with pytest.raises(AssertionError):
        check(GEMMS[2], [64, 128, 300], 1, 0)
