"""`moe_experts` on a GPU: every backend that runs there against the oracle, waiting for nobody."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from sonicmoe_kernels.backends import HOPPER_CAPABILITY, HOPPER_IMPLEMENTED
from sonicmoe_kernels.moe import moe_experts

from tests.cases import (
    ACTIVATION_CASES,
    BENCHMARK_CASES,
    DRAWN_CASE,
    ROUTINGS,
    SMALL_CASES,
    Case,
    make_inputs,
    make_plan,
)
from tests.oracle import CALC_DIFF_BOUND, CALC_DIFF_BOUND_COMPOSITION, check_experts, convert

CASE = SMALL_CASES[0]
EDGES = SMALL_CASES[-1]
SCALED_CASES = tuple(
    dataclasses.replace(case, T=max(case.T // 16, case.E), routing=routing)
    for case in (BENCHMARK_CASES["7b"], BENCHMARK_CASES["30b_n1024"])
    for routing in ROUTINGS
)


def _bound(backend: str) -> float:
    return CALC_DIFF_BOUND if backend == "hopper" else CALC_DIFF_BOUND_COMPOSITION


@pytest.fixture(params=["torch", "hopper"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "hopper":
        if not HOPPER_IMPLEMENTED:
            pytest.skip("this version has no Hopper kernels")
        if torch.cuda.get_device_capability() != HOPPER_CAPABILITY:
            pytest.skip("needs compute capability 9.0")
    return request.param


@pytest.fixture
def no_host_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def exact_fp32_oracle() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    "case", SMALL_CASES + ACTIVATION_CASES + SCALED_CASES, ids=lambda case: case.name
)
def test_experts_agree_with_the_fp32_oracle(case: Case, backend: str) -> None:
    check_experts(case, device="cuda", backend=backend, calc_diff_bound=_bound(backend))


def _prepared(case: Case) -> tuple[list[torch.Tensor], torch.Tensor, object]:
    inputs = convert(make_inputs(case), dtype=torch.bfloat16, device="cuda")
    leaves = [t.clone().requires_grad_() for t in inputs[:4]]
    return leaves, inputs.dout_TD, make_plan(case, inputs.pairs, device="cuda")


@pytest.mark.parametrize("case", [CASE, EDGES, DRAWN_CASE], ids=lambda case: case.name)
def test_forward_and_backward_never_wait_for_the_gpu(
    case: Case, backend: str, request: pytest.FixtureRequest
) -> None:
    leaves, dout, plan = _prepared(case)
    moe_experts(*leaves, plan, backend=backend).backward(dout)  # load modules first
    request.getfixturevalue("no_host_waits")
    moe_experts(*leaves, plan, backend=backend).backward(dout)


@pytest.mark.parametrize("case", [CASE, EDGES, DRAWN_CASE], ids=lambda case: case.name)
def test_a_cuda_graph_replays_the_same_result(case: Case, backend: str) -> None:
    leaves, dout, plan = _prepared(case)

    def step() -> list[torch.Tensor]:
        out = moe_experts(*leaves, plan, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    # Detached: an eager graph kept alive ties the leaves to its stream, which capture forbids.
    eager = [tensor.detach() for tensor in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for tensor in captured:
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip(captured, eager, strict=True):
            assert torch.equal(got, expected)


def test_repeats_are_bitwise_equal(backend: str) -> None:
    leaves, dout, plan = _prepared(EDGES)

    def step() -> list[torch.Tensor]:
        out = moe_experts(*leaves, plan, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    first = step()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
