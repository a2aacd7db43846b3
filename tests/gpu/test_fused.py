"""The block as one operator against the block by modules, both by our kernels, on a Hopper GPU.

Legend: B batch, L sequence, T = B * L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sonicmoe_kernels.backends import HOPPER_CAPABILITY

pytest.importorskip("torchtitan")

from sonicmoe_kernels.block import FEW_TOKENS
from sonicmoe_kernels.rounding import ROUNDINGS

from tests.titan.fused_blocks import (
    ROUTERS,
    SIZES,
    VARIANTS,
    assert_alike,
    build,
    by_modules,
    fused_calls,
    run,
    tokens,
)

GPU = torch.device("cuda")
SHAPES = {"few": (1, 1024), "odd": (3, 347), "one token": (1, 1), "many": (1, FEW_TOKENS + 3)}


@pytest.fixture(autouse=True)
def hopper_gpu() -> Iterator[None]:
    if torch.cuda.get_device_capability() != HOPPER_CAPABILITY:
        pytest.skip("needs compute capability 9.0")
    yield
    torch.cuda.synchronize()  # what goes wrong in a kernel belongs to its test


def compare(shape: tuple[int, int], variant: str = "renormalised", **options: Any) -> None:
    """Two passes of either; with the same draws."""
    module = build(variant, backend="hopper", device=GPU, **options)
    x_BLD = tokens(*shape, module.router.gate.weight.shape[1], device=GPU)
    expected = run(by_modules(module), x_BLD)
    with fused_calls() as calls:
        found = run(module, x_BLD)
    assert calls.call_count == 2, "the block was not fused"
    assert_alike(found, expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_token_choice_is_that_of_the_modules(sizes, shape) -> None:
    compare(shape, sizes=sizes)


@pytest.mark.parametrize("shape", ["few", "odd", "many"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_token_rounding_is_that_of_the_modules(sizes, shape) -> None:
    compare(SHAPES[shape], sizes=sizes, **ROUTERS["nearest"])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_rounding_is_that_of_the_modules(rounding: str) -> None:
    compare(SHAPES["odd"], **ROUTERS[rounding])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("router", ["topk", "nearest"])
def test_every_way_to_score_is_that_of_the_modules(variant: str, router: str) -> None:
    compare(SHAPES["odd"], variant, **ROUTERS[router])


@pytest.mark.parametrize("router", ["topk", "nearest"])
def test_evaluation_is_that_of_the_modules(router: str) -> None:
    module = build(backend="hopper", device=GPU, **ROUTERS[router]).eval()
    x_BLD = tokens(2, 300, module.router.gate.weight.shape[1], device=GPU)
    with torch.no_grad():
        assert torch.equal(module(x_BLD), by_modules(module)(x_BLD))
    assert module.stats.values_V.count_nonzero() == 0


@pytest.mark.parametrize("router", ["topk", "nearest"])
def test_results_are_repeatable_bit_for_bit(router: str) -> None:
    module = build(sizes=SIZES["7b"], backend="hopper", device=GPU, **ROUTERS[router])
    x_BLD = tokens(1, 1024, 1536, device=GPU)
    results = []
    for _ in range(2):
        module.stats.reset()
        module.tokens_per_expert_E.zero_()
        found = run(module, x_BLD)
        results.append({name: value.clone() for name, value in found.items()})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_a_captured_step_counts_and_computes_at_every_replay() -> None:
    module = build(backend="hopper", device=GPU)
    x_BLD = tokens(1, 512, module.router.gate.weight.shape[1], device=GPU)
    wanted = [x_BLD, *module.parameters()]
    dout_BLD = torch.randn_like(x_BLD)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = torch.autograd.grad(module(x_BLD), wanted, dout_BLD)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(module(x_BLD), wanted, dout_BLD)
    module.stats.reset()
    for _ in range(3):
        graph.replay()
    seen = dict(zip(module.stats.NAMES, module.stats.values_V.tolist(), strict=True))
    assert (seen["microbatches"], seen["tokens"]) == (3, 3 * 512)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("router", ["topk", "nearest"])
def test_no_more_memory_is_held_at_once_than_by_the_modules(router: str) -> None:
    module = build(sizes=SIZES["7b"], backend="hopper", device=GPU, **ROUTERS[router])
    x_BLD = tokens(1, 4096, 1536, device=GPU)
    peaks = []
    for each in (by_modules(module), module):
        run(each, x_BLD)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(each, x_BLD)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 1.02 * peaks[0], peaks
