"""The ragged-M kernels one by one on a GPU: every routing, tile, activation and dtype."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels import hopper
from sonicmoe_kernels.backends import HOPPER_CAPABILITY
from sonicmoe_kernels.tiles import ROW_TILES, RowGemm, RowTile, why_illegal

from scripts.gpu_check import row_tiles
from tests.cases import ACTIVATION_CASES, ROUTINGS, SMALL_CASES, Case
from tests.gpu.row_kernels import (
    CHECKS,
    KERNELS,
    forced_tile,
    launchers,
    make_problem,
    same_bits,
)

# Widths that fill no tile, an odd number of n tiles, and more n tiles than one cluster takes.
WIDTHS = ((64, 64), (192, 192), (128, 320), (320, 128), (768, 256), (1536, 256))
# Every kernel with the tile that the table picks, and what it picks for few wherever that is legal;
# turned tiles, which take ten times as long to compile, have a test of their own.
CHOICES = [
    *((kernel, None) for kernel in KERNELS),
    *(
        (kernel, tile)
        for kernel, tiles in ROW_TILES.items()
        for tile in tiles
        if tile.schedule == "relayed" or (tile.dynamic and tile.schedule != "turned")
    ),
]
TURNED = [(kernel, tile) for kernel, tile in row_tiles() if tile.schedule == "turned"]
REPEATS = 1000
HUGE = 2**31  # elements: beyond it 32-bit offsets overflow


@pytest.fixture(autouse=True)
def hopper_gpu() -> Iterator[None]:
    if torch.cuda.get_device_capability() != HOPPER_CAPABILITY:
        pytest.skip("needs compute capability 9.0")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.empty_cache()


def chosen(
    kernel: str, tile: RowTile | None, case: Case
) -> contextlib.AbstractContextManager[None]:
    """Launches `kernel` with the tile if it serves the case, or with the table's if None."""
    if tile is None:
        return contextlib.nullcontext()
    gemm = RowGemm(kernel, case.D, case.F, case.E, "bfloat16", case.activation, tile)
    if reason := why_illegal(gemm):
        pytest.skip(reason)
    return forced_tile(kernel, tile)


@pytest.mark.parametrize(("kernel", "tile"), CHOICES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES + ACTIVATION_CASES, ids=lambda case: case.name)
def test_kernel_agrees_with_fp32(case: Case, kernel: str, tile: RowTile | None) -> None:
    with chosen(kernel, tile, case):
        CHECKS[kernel](make_problem(case, torch.bfloat16))


@pytest.mark.parametrize(("kernel", "tile"), CHOICES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("widths", WIDTHS, ids=lambda widths: f"D{widths[0]}_F{widths[1]}")
def test_every_width_works_on_every_routing(
    widths: tuple[int, int], routing: str, kernel: str, tile: RowTile | None
) -> None:
    case = Case(1000, *widths, E=24, K=3, routing=routing)
    with chosen(kernel, tile, case):
        CHECKS[kernel](make_problem(case, torch.bfloat16))


@pytest.mark.parametrize(("kernel", "tile"), TURNED, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "case",
    [
        Case(3300, 192, 192, 24, 3),
        Case(3300, 320, 320, 24, 3),  # the last tile has no column
        Case(3300, 768, 256, 24, 3, activation="relu2"),
    ],
    ids=lambda case: case.name,
)
def test_turned_tiles_of_every_width_are_right(
    case: Case, routing: str, kernel: str, tile: RowTile
) -> None:
    """An expert has none, some, several tiles of rows, or more than a row group."""
    with forced_tile(kernel, tile):
        CHECKS[kernel](make_problem(dataclasses.replace(case, routing=routing), torch.bfloat16))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_agrees_with_fp32_in_fp16(kernel: str) -> None:
    CHECKS[kernel](make_problem(SMALL_CASES[0], torch.float16))


@pytest.mark.parametrize(("kernel", "tile"), row_tiles(), ids=str)
def test_every_tile_is_right(kernel: str, tile: RowTile) -> None:
    case = Case(2000, 768, 256, E=24, K=3, routing="tile_edges")
    # The narrowest tile of `up` has no room for two sources: it serves activations without gate.
    cases = [dataclasses.replace(case, activation=name) for name in ("swiglu", "silu")]
    case = next(
        c
        for c in cases
        if why_illegal(RowGemm(kernel, c.D, c.F, c.E, "bfloat16", c.activation, tile)) is None
    )
    with forced_tile(kernel, tile):
        CHECKS[kernel](make_problem(case, torch.bfloat16))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_thousand_experts_most_of_them_empty(kernel: str) -> None:
    case = Case(300, 64, 64, E=1024, K=2, routing="zipf")
    CHECKS[kernel](make_problem(case, torch.bfloat16))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_relayed_tile_reads_many_experts_offsets_where_they_are(routing: str) -> None:
    tile = next(tile for tile in ROW_TILES["d_hidden"] if tile.schedule == "relayed")
    case = Case(3000, 768, 256, E=512, K=3, routing=routing)
    with chosen("d_hidden", tile, case):
        CHECKS["d_hidden"](make_problem(case, torch.bfloat16))


@pytest.mark.parametrize(("kernel", "tile"), CHOICES + TURNED, ids=str)
def test_repeats_are_bitwise_equal_while_another_stream_loads_the_gpu(
    kernel: str, tile: RowTile | None
) -> None:
    case = Case(2000, 768, 256, E=24, K=3, routing="zipf")
    with chosen(kernel, tile, case):
        problem = make_problem(case, torch.bfloat16)
        launch = launchers(problem)[kernel]
        other, noise = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")

        def run() -> list[torch.Tensor]:
            for tensor in launch.outputs:
                tensor.fill_(float("nan"))
            launch.call()
            return [tensor.clone() for tensor in launch.outputs]

        expected = run()
        for repeat in range(REPEATS):
            if repeat % 10 == 0:
                with torch.cuda.stream(other):
                    noise @ noise
            for got, wanted in zip(run(), expected, strict=True):
                assert same_bits(got, wanted), f"repeat {repeat}"


@pytest.mark.parametrize("kernel", ("up", "d_hidden"))
def test_gathered_rows_beyond_31_bits_of_elements(kernel: str) -> None:
    case = Case(HUGE // 4096 + 1000, 4096, 64, E=4, K=1)
    CHECKS[kernel](make_problem(case, torch.bfloat16))


@pytest.mark.parametrize("kernel", ("down", "d_input"))
def test_outputs_beyond_31_bits_of_elements(kernel: str) -> None:
    case = Case(HUGE // 7168 + 1000, 7168, 64, E=4, K=1)
    CHECKS[kernel](make_problem(case, torch.bfloat16))


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_beyond_31_bits_of_elements(kernel: str) -> None:
    case = Case(1200, 4096, 2048, E=HUGE // (4096 * 2048) + 4, K=4)
    CHECKS[kernel](make_problem(case, torch.bfloat16))


def test_fifty_token_counts_run_one_kernel() -> None:
    for tokens in range(1, 51):
        problem = make_problem(dataclasses.replace(SMALL_CASES[0], T=tokens), torch.bfloat16)
        for launch in launchers(problem).values():
            launch.call()
        if tokens == 1:
            loaded = kernel_cache.load.cache_info().misses
    assert kernel_cache.load.cache_info().misses == loaded


def test_wrong_dtypes_and_shapes_are_refused() -> None:
    problem = make_problem(SMALL_CASES[0], torch.bfloat16)
    case, w2 = problem.case, problem.inputs.w2_EDF
    a, y = (torch.zeros(problem.r_max, n, device="cuda").to(w2) for n in (case.F, case.D))
    kernel = kernel_cache.load(hopper.row_gemm("down", case.D, case.F, case.E, w2.dtype, "swiglu"))
    for wrong in (a.half(), a[:, 1:].contiguous(), a[1:]):
        with pytest.raises((TypeError, ValueError), match="Mismatched"):
            kernel(None, wrong, problem.expert_offsets, w2, y, 2)
