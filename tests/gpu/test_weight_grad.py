"""The weight gradient kernels on a GPU, against fp32 products expert by expert.

Legend: T tokens, D model width, F expert width, E experts, R routed rows, N columns of the operand
that lies in order (F, or halves * F).

Before every call outputs are NaN, rows past R are NaN, and indices past R name a token that does
not exist, so that reading one faults.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from sonicmoe_kernels import hopper
from torch import Tensor

from scripts.gpu_check import weight_tiles
from tests.cases import EDGE_COUNTS
from tests.gpu.row_kernels import forced_tile
from tests.oracle import CALC_DIFF_BOUND, calc_diff

GARBAGE_ROWS = 300
GARBAGE_TOKEN = 2**30
REPEATS = 50
ROUTINGS = {
    "tile edges": [*EDGE_COUNTS, 2, 0, 255, 256, 257, 0, 300, 31],
    "zipf": [int(1800 / (rank + 1) ** 1.2) for rank in range(64)],
    "one expert": [0] * 7 + [2900] + [0] * 8,
    "half empty": [200, 0] * 32,
    "all empty": [0] * 16,
    "one row": [0, 0, 1],
    "1024 experts": [(7 * expert) % 40 for expert in range(1024)],
}
WIDTHS = [(1536, 256), (768, 256), (64, 64), (192, 192), (128, 320), (320, 128), (4096, 1024)]
OUTPUTS = {"dw2": 0, "dw1": 1, "dw1 and dw3": 2}


class Problem(NamedTuple):
    """halves: 0 for dW2, else how many halves dH has."""

    gathered_TD: Tensor
    token_idx_R: Tensor
    expert_offsets: Tensor
    ordered_RN: Tensor
    bounds: list[int]
    halves: int

    def run(self) -> list[Tensor]:
        """The kernel's outputs, written over NaN."""
        experts, d = len(self.bounds) - 1, self.gathered_TD.shape[1]
        width = self.ordered_RN.shape[1] // max(self.halves, 1)
        shape = (experts, width, d) if self.halves else (experts, d, width)
        made = max(self.halves, 1)
        outputs = [self.ordered_RN.new_full(shape, float("nan")) for _ in range(made)]
        operands = (self.gathered_TD, self.token_idx_R, self.expert_offsets)
        if self.halves == 0:
            hopper.d_weight2(*operands, self.ordered_RN, outputs[0])
        else:
            dh_RHF = self.ordered_RN.unflatten(1, (self.halves, width))
            hopper.d_weight13(*operands, dh_RHF, outputs[0], outputs[1] if made == 2 else None)
        return outputs

    def reference(self, expert: int) -> list[Tensor]:
        """The expert's gradients in fp32."""
        rows = slice(self.bounds[expert], self.bounds[expert + 1])
        gathered = self.gathered_TD[self.token_idx_R[rows].long()].float()
        product = gathered.T @ self.ordered_RN[rows].float()
        return [product] if self.halves == 0 else [half.T for half in product.chunk(self.halves, 1)]


def make_problem(
    counts: list[int], d: int, f: int, halves: int, *, dtype=torch.bfloat16, tokens=3001, seed=0
) -> Problem:
    """Draws tokens without repetition per expert, and operands scaled so that outputs are O(1)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    bounds = torch.tensor([0, *counts]).cumsum(0)
    rows, n = int(bounds[-1]), max(halves, 1) * f

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    index = torch.full((rows + GARBAGE_ROWS,), GARBAGE_TOKEN, dtype=torch.int32, device="cuda")
    for first, count in zip(bounds.tolist(), counts, strict=False):
        drawn = torch.randperm(tokens, generator=generator, device="cuda")[:count]
        index[first : first + count] = drawn.sort().values
    ordered = normal(rows + GARBAGE_ROWS, n) * max(1, rows / len(counts)) ** -0.5
    ordered[rows:] = float("nan")
    return Problem(
        normal(tokens, d).to(dtype),
        index,
        bounds.to(torch.int32).cuda(),
        ordered.to(dtype),
        bounds.tolist(),
        halves,
    )


def check(problem: Problem, label: str) -> None:
    """Every expert's gradients against fp32."""
    outputs = problem.run()
    for expert in range(len(problem.bounds) - 1):
        for which, theirs in enumerate(problem.reference(expert)):
            mine = outputs[which][expert]
            where = f"{label}, output {which}, expert {expert}"
            assert torch.isfinite(mine).all(), f"{where}: not finite"
            difference = calc_diff(mine, theirs)
            assert difference < CALC_DIFF_BOUND, f"{where}: calc_diff {difference:.2e}"


@pytest.fixture(autouse=True)
def _exact_reference():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_match_fp32_on_every_routing(routing, outputs):
    check(make_problem(ROUTINGS[routing], 1536, 256, OUTPUTS[outputs]), routing)


@pytest.mark.parametrize(("kernel", "tile"), weight_tiles(), ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_tile_is_right_on_every_routing(routing, kernel, tile):
    problem = make_problem(ROUTINGS[routing], 1536, 256, 0 if kernel == "d_weight2" else 2)
    with forced_tile(kernel, tile):
        check(problem, f"{tile} {routing}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("widths", WIDTHS, ids=lambda widths: f"D{widths[0]}_F{widths[1]}")
@pytest.mark.parametrize("outputs", ["dw2", "dw1 and dw3"])
def test_gradients_match_fp32_at_every_width(widths, outputs, dtype):
    counts = ROUTINGS["tile edges"]
    check(make_problem(counts, *widths, OUTPUTS[outputs], dtype=dtype), f"{widths} {dtype}")


@pytest.mark.parametrize("outputs", ["dw2", "dw1 and dw3"])
@pytest.mark.parametrize("poisoned", [0, 1])
def test_no_expert_reads_its_neighbours_rows(poisoned, outputs):
    """Every second expert's rows are NaN in both operands; the others stay finite."""
    counts = [129, 65, 1, 63, 128, 127, 64, 100]
    problem = make_problem(counts, 192, 128, OUTPUTS[outputs])
    rows = torch.arange(sum(counts), device="cuda", dtype=torch.int32)
    problem.token_idx_R[: sum(counts)] = rows  # every token belongs to one expert
    for expert in range(poisoned, len(counts), 2):
        bad = slice(problem.bounds[expert], problem.bounds[expert + 1])
        problem.gathered_TD[bad] = float("nan")
        problem.ordered_RN[bad] = float("nan")
    for output in problem.run():
        finite = [bool(torch.isfinite(part).all()) for part in output]
        assert finite == [expert % 2 != poisoned for expert in range(len(counts))]


@pytest.mark.parametrize("outputs", ["dw2", "dw1 and dw3"])
def test_experts_without_rows_get_exact_zeros(outputs):
    problem = make_problem(ROUTINGS["half empty"], 320, 192, OUTPUTS[outputs])
    for output in problem.run():
        assert (output[1::2] == 0).all()
        assert (output[0::2] != 0).any()


@pytest.mark.parametrize("outputs", ["dw2", "dw1 and dw3"])
def test_repeats_are_bitwise_equal_beside_other_work(outputs):
    problem = make_problem(ROUTINGS["zipf"], 1536, 256, OUTPUTS[outputs])
    first = problem.run()
    noise, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            noise @ noise
        for expected, again in zip(first, problem.run(), strict=True):
            assert torch.equal(expected, again)
    torch.cuda.synchronize()


def test_a_captured_graph_serves_other_routings():
    """Nothing of a routing is baked in: one capture, then new offsets and indices in place."""
    problem = make_problem(ROUTINGS["tile edges"], 768, 256, 2)
    output = torch.empty(2, 16, 256, 768, dtype=torch.bfloat16, device="cuda")
    dh_RHF = problem.ordered_RN.unflatten(1, (2, 256))
    operands = (problem.gathered_TD, problem.token_idx_R, problem.expert_offsets, dh_RHF)
    hopper.d_weight13(*operands, output[0], output[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hopper.d_weight13(*operands, output[0], output[1])
    rows = problem.bounds[-1]
    bounds = torch.linspace(0, rows, 17).to(torch.int32)
    problem.expert_offsets.copy_(bounds)
    problem.token_idx_R[:rows] = problem.token_idx_R[:rows].flip(0)
    output.fill_(float("nan"))
    graph.replay()
    moved = problem._replace(bounds=bounds.tolist())
    for expert in range(16):
        for mine, theirs in zip(output[:, expert], moved.reference(expert), strict=True):
            assert calc_diff(mine, theirs) < CALC_DIFF_BOUND, expert


@pytest.mark.parametrize("outputs", ["dw2", "dw1"])
def test_outputs_beyond_2_to_the_31_elements_are_addressed(outputs):
    experts, d, f = 520, 4096, 1024  # 2.18e9 elements
    counts = [expert % 5 for expert in range(experts)]
    problem = make_problem(counts, d, f, OUTPUTS[outputs], tokens=64)
    output = problem.run()[0]
    for expert in (0, 1, 2, 511, 512, 513, 519):
        assert calc_diff(output[expert], problem.reference(expert)[0]) < CALC_DIFF_BOUND, expert


def test_gathered_rows_beyond_2_to_the_31_elements_are_addressed():
    tokens, d = 540_000, 4096  # 2.2e9 elements
    problem = make_problem([64, 65, 1], d, 64, 0, tokens=tokens)
    rows = problem.bounds[-1]
    last = torch.arange(tokens - rows, tokens, device="cuda", dtype=torch.int32)
    problem.token_idx_R[:rows] = last
    check(problem, "last tokens")
