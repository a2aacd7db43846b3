"""`moe_experts` on the Hopper kernels: wrong copies fail, garbage stays out, streams, devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels import hopper
from sonicmoe_kernels.backends import HOPPER_CAPABILITY
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan
from torch import Tensor

from tests.cases import (
    BENCHMARK_CASES,
    BENCHMARK_GROUPS,
    DRAWN_CASE,
    ODD_CASES,
    SMALL_CASES,
    Case,
    make_inputs,
    make_plan,
)
from tests.oracle import check_experts, convert

CASE = SMALL_CASES[0]
EDGES = SMALL_CASES[-1]
REPEATS = 1000
TILE_ROWS = 128
# As wide and with as many experts as there, on fewer tokens.
PAPER_CASES = tuple(
    dataclasses.replace(case, T=max(case.T // 16, case.E))
    for case in (BENCHMARK_CASES[name] for name in BENCHMARK_GROUPS["paper"])
)


@pytest.fixture(autouse=True)
def hopper_gpu() -> Iterator[None]:
    if torch.cuda.get_device_capability() != HOPPER_CAPABILITY:
        pytest.skip("needs compute capability 9.0")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


class Layer:
    """One case's tensors on a device, and a step that returns output and gradients."""

    def __init__(self, case: Case, device: str = "cuda", inplace_dh: bool = True) -> None:
        inputs = convert(make_inputs(case), dtype=torch.bfloat16, device=device)
        self.leaves = [t.clone().requires_grad_() for t in inputs[:4]]
        self.dout_TD = inputs.dout_TD
        self.plan = make_plan(case, inputs.pairs, device=device)
        self.inplace_dh = inplace_dh

    def forward(self) -> Tensor:
        return moe_experts(*self.leaves, self.plan, backend="hopper", inplace_dh=self.inplace_dh)

    def step(self) -> list[Tensor]:
        out = self.forward()
        return [out, *torch.autograd.grad(out, self.leaves, self.dout_TD)]


def _after(change: Callable[..., None]) -> Callable[[Callable], Callable]:
    """A mutation that runs the kernel and then spoils what it wrote."""

    def mutation(original: Callable) -> Callable:
        def mutated(*args, **kwargs) -> None:
            original(*args, **kwargs)
            change(*args)

        return mutated

    return mutation


def _zero_argument(index: int) -> Callable[[Callable], Callable]:
    return _after(lambda *args: args[index].zero_())


def _swapped(*indices: int) -> Callable[[Callable], Callable]:
    """Hands arguments over in another order."""

    def mutation(original: Callable) -> Callable:
        def mutated(*args, **kwargs) -> None:
            order = list(range(len(args)))
            for place, index in zip(indices, indices[1:] + indices[:1], strict=True):
                order[place] = index
            original(*(args[i] for i in order), **kwargs)

        return mutated

    return mutation


def _two_experts_swapped(original: Callable) -> Callable:
    def mutated(a_RF, offsets, w2_EDF, y_RD, **kwargs) -> None:
        order = torch.arange(w2_EDF.shape[0], device=w2_EDF.device)
        order[:2] = order[:2].flip(0)
        original(a_RF, offsets, w2_EDF[order], y_RD, **kwargs)

    return mutated


def _last_tile_lost(_a, offsets: Tensor, _w, y_RD: Tensor) -> None:
    end = int(offsets[-1])
    y_RD[max(end - (end % TILE_ROWS or TILE_ROWS), 0) : end] = 0


def _one_row_beyond(dout_TD, index_R, offsets, a_RF, dw2_EDF) -> None:
    row = int(offsets[3])
    dw2_EDF[2] += torch.outer(dout_TD[index_R[row]], a_RF[row])


def _score_forgotten(original: Callable) -> Callable:
    def mutated(dout, index, offsets, w2, score_R, h, *outputs, **kwargs) -> None:
        original(dout, index, offsets, w2, torch.ones_like(score_R), h, *outputs, **kwargs)

    return mutated


MUTATIONS = {
    "up stores no A": ("up", _zero_argument(6)),
    "up stores no H": ("up", _zero_argument(5)),
    "gate and up swapped": ("up", _swapped(3, 4)),
    "two experts swapped": ("down", _two_experts_swapped),
    "last tile dropped": ("down", _after(_last_tile_lost)),
    "aggregation writes zeros": ("aggregate", _zero_argument(3)),
    "score forgotten in dH and A'": ("d_hidden", _score_forgotten),
    "dS not written": ("d_hidden", _zero_argument(8)),
    "one row beyond an expert read": ("d_weight2", _after(_one_row_beyond)),
    "dW1 and dW3 swapped": ("d_weight13", _swapped(4, 5)),
    "dX~ of swapped weights": ("d_input_rows", _swapped(2, 3)),
}


@pytest.mark.parametrize("case", PAPER_CASES + ODD_CASES, ids=lambda case: case.name)
def test_every_shape_of_the_paper_agrees_with_the_fp32_oracle(case: Case) -> None:
    check_experts(case, device="cuda", backend="hopper")
    torch.cuda.empty_cache()  # up to 50 GB


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_copy_fails_the_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, mutate = MUTATIONS[name]
    check_experts(CASE, device="cuda", backend="hopper")
    monkeypatch.setattr(hopper, function, mutate(getattr(hopper, function)))
    with pytest.raises(AssertionError):
        check_experts(CASE, device="cuda", backend="hopper")


def _with_garbage(plan: RoutingPlan, rows: int) -> RoutingPlan:
    """The plan with `rows` garbage rows behind R, as a bound R_max > R leaves them."""

    def extend(values: Tensor, filler: float) -> Tensor:
        return torch.cat((values, torch.full((rows,), filler, dtype=values.dtype).to(values)))

    return dataclasses.replace(
        plan,
        token_idx_R=extend(plan.token_idx_R, 0),
        score_R=extend(plan.score_R, float("nan")),
        token_rows_R=extend(plan.token_rows_R, 2**30),
        rows_per_token=None,
    )


@pytest.mark.parametrize("case", [CASE, EDGES], ids=lambda case: case.name)
def test_garbage_rows_reach_no_output_and_no_gradient(case: Case) -> None:
    layer = Layer(case)
    clean = layer.step()
    layer.plan = _with_garbage(layer.plan, 700)
    for _ in range(3):  # whatever the allocator hands out holds NaN
        garbage = torch.full((2**28,), float("nan"), dtype=torch.bfloat16, device="cuda")
        del garbage
        for expected, got in zip(clean, layer.step(), strict=True):
            assert torch.equal(expected, got)


def test_a_thousand_steps_beside_another_stream_are_bitwise_equal() -> None:
    layer = Layer(EDGES)
    first = layer.step()
    noise, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            noise @ noise
        assert all(torch.equal(a, b) for a, b in zip(first, layer.step(), strict=True))


def test_kernels_run_on_the_current_stream() -> None:
    layer = Layer(CASE)
    expected = layer.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        layer.dout_TD.mul_(2)  # late: a kernel on another stream would not see it
        doubled = layer.step()
    torch.cuda.current_stream().wait_stream(stream)
    for got, want in zip(doubled[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, 2 * want, rtol=1e-2, atol=1e-2)


def test_steps_on_two_streams_at_once_draw_from_counters_of_their_own() -> None:
    layer = Layer(DRAWN_CASE)
    assert hopper.row_gemm("up", 4096, 1024, 4, torch.bfloat16, "swiglu").tile.dynamic
    expected = layer.step()
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(layer.step())
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(got, want) for got, want in zip(result, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one() -> None:
    expected = [t.cpu() for t in Layer(CASE, "cuda:0").step()]
    assert torch.cuda.current_device() == 0
    for got, want in zip(Layer(CASE, "cuda:1").step(), expected, strict=True):
        assert got.device.index == 1
        assert torch.equal(got.cpu(), want)


def test_a_second_backward_raises_where_dh_overwrote_h() -> None:
    layer = Layer(CASE)
    out = layer.forward()
    torch.autograd.grad(out, layer.leaves, layer.dout_TD, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, layer.leaves, layer.dout_TD)


def test_a_second_backward_agrees_where_h_is_kept() -> None:
    layer = Layer(CASE, inplace_dh=False)
    out = layer.forward()
    first = torch.autograd.grad(out, layer.leaves, layer.dout_TD, retain_graph=True)
    second = torch.autograd.grad(out, layer.leaves, layer.dout_TD)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("inplace_dh", [True, False])
def test_what_backward_keeps_may_be_offloaded(inplace_dh: bool) -> None:
    layer = Layer(EDGES, inplace_dh=inplace_dh)
    expected = layer.step()
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        out = layer.forward()
    got = [out, *torch.autograd.grad(out, layer.leaves, layer.dout_TD)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_new_token_count_compiles_nothing() -> None:
    Layer(CASE).step()
    built = kernel_cache.load.cache_info().misses
    for tokens in range(1, 51):
        Layer(dataclasses.replace(CASE, T=tokens)).step()
    assert kernel_cache.load.cache_info().misses == built


@pytest.mark.parametrize("inplace_dh", [True, False])
def test_compiled_by_inductor_as_one_graph(inplace_dh: bool) -> None:
    layer = Layer(CASE, inplace_dh=inplace_dh)
    eager = layer.step()

    @torch.compile(fullgraph=True)
    def run(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        out = moe_experts(x * 1.0, w1, w3, w2, layer.plan, backend="hopper", inplace_dh=inplace_dh)
        return out * 1.0

    out = run(*layer.leaves)
    compiled = [out, *torch.autograd.grad(out, layer.leaves, layer.dout_TD)]
    for got, want in zip(compiled, eager, strict=True):
        assert torch.equal(got, want)
