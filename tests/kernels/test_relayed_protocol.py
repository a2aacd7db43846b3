"""The relayed kernels' protocol: their own code on a machine that runs warps in random order."""

import os

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

from functools import partial

import pytest

pytest.importorskip("cutlass")
from sonicmoe_kernels.cute import d_hidden_relayed
from sonicmoe_kernels.cute.epilogues import Gradients
from sonicmoe_kernels.cute.relayed import SLICE_ROWS
from sonicmoe_kernels.tiles import (
    SLICES,
    TILE_M,
    WARPGROUP_ROWS,
    RowGemm,
    RowTile,
    why_illegal,
)

from tests.kernels.relayed_machine import Machine
from tests.kernels.symbols import FRAGMENT, Symbol, differentiate, h_values
from tests.kernels.warps import check_seeds

ROWS = (0, 1, 15, 16, 17, 48, 63, 64, 65, 127, 128, 129, 191, 193, 256, 257, 300, 385)
# F of one n tile (an odd m tile leaves a CTA out of range), of one and a half, of two, of three.
GEMMS = [
    RowGemm("d_hidden", 192, 128, 3, "bfloat16", "swiglu", RowTile(128, 2, "relayed", load_sets=4)),
    RowGemm("d_hidden", 128, 320, 3, "bfloat16", "swiglu", RowTile(256, 3, "relayed", load_sets=4)),
    RowGemm("d_hidden", 64, 384, 3, "float16", "relu2", RowTile(128, 3, "relayed", load_sets=4)),
]


def label(gemm):
    tile = gemm.tile
    return f"{gemm.kernel}-{gemm.activation}-{tile.tile_n}x{gemm.n_tiles}-{tile.stages}"


def handed_over(gemm, first, local_row, column):
    """What a fragment of the sums holds: (slice, "sum", first row of the block, n, number)."""
    block_row, part = local_row // WARPGROUP_ROWS, local_row % WARPGROUP_ROWS // SLICE_ROWS
    n, chunk = divmod(column, gemm.epi_chunks)
    number = chunk * gemm.tile.epi_n // 2
    row = first + block_row * WARPGROUP_ROWS
    return [Symbol((part, "sum", row, n, number + i)) for i in range(FRAGMENT)]


def gradients_of(gemm, first, rows, slice_row, column) -> list[tuple[Symbol, Symbol, Gradients]]:
    """(score, dA', gradients) of a fragment's values; its rows are 0, 0, 8, 8 of the slice."""
    columns = [h_values(first + slice_row, column, half) for half in range(gemm.halves)]
    result = []
    for i, da in enumerate(handed_over(gemm, first, slice_row, column)):
        row = min(slice_row + i // 2 * 8, rows - 1)
        score = Symbol(("score", first + row))
        h = tuple(values[i] for values in columns)
        result.append((score, da, differentiate(gemm.activation, h, score * da)))
    return result


def expected_d_hidden(gemm, first, rows, outputs, d_scores):
    for slice_row in range(0, rows, SLICE_ROWS):
        for n in range(gemm.n_tiles):
            sums = [0.0, 0.0]
            for column in range(n * gemm.epi_chunks, (n + 1) * gemm.epi_chunks):
                values = gradients_of(gemm, first, rows, slice_row, column)
                for i, (_, da, gradients) in enumerate(values):
                    sums[i // 2] = sums[i // 2] + da * gradients.a
                if column * gemm.tile.epi_n >= gemm.f:
                    continue
                for row in range(slice_row, min(slice_row + SLICE_ROWS, rows)):
                    a = tuple(score * gradients.a for score, _, gradients in values)
                    outputs["A", first + row, column, 0] = a
                    for half in range(gemm.halves):
                        dh = tuple(gradients.dh[half] for _, _, gradients in values)
                        outputs["dH", first + row, column, half] = dh
            d_scores[n, first + slice_row] = tuple(sums)


def check(gemm, counts, clusters, seed):
    """One interleaving: no deadlock, no hazard, every output stored once with its own values."""
    machine = Machine(gemm, counts, clusters, seed)
    machine.run()
    outputs, d_scores = {}, {}
    for expert, rows in enumerate(counts):
        first = machine.offsets[expert]
        expected_d_hidden(gemm, first, rows, outputs, d_scores)
    assert machine.outputs == outputs
    assert machine.d_scores == d_scores


@pytest.mark.parametrize("gemm", GEMMS, ids=label)
def test_every_interleaving_stores_every_value_once(gemm):
    assert why_illegal(gemm) is None
    check_seeds(partial(check, gemm), label(gemm), ROWS, gemm.num_experts)


@pytest.mark.parametrize("rows", [1, SLICE_ROWS, WARPGROUP_ROWS + 1, TILE_M, TILE_M + 1])
def test_more_clusters_than_units_end_as_well(rows):
    check(GEMMS[0], [0, rows, 0], 6, rows)


def test_the_machine_notices_a_load_set_that_is_refilled_too_early(monkeypatch):
    monkeypatch.setattr(d_hidden_relayed, "AHEAD", SLICES)
    with pytest.raises(AssertionError, match="was overwritten before its store had read it"):
        for seed in range(10):
            check(GEMMS[0], [64, 128, 17], 1, seed)


def test_the_machine_notices_a_warpgroup_counted_as_one_arrival(monkeypatch):
    monkeypatch.setattr(d_hidden_relayed.Relayed, "barrier_arrivals", lambda self, barrier: 1)
    with pytest.raises(AssertionError, match="more arrivals than the barrier counts"):
        check(GEMMS[0], [64, 0, 0], 1, 0)
