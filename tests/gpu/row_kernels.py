"""Checks of the GEMM kernels one by one: against fp32 loops over experts, on poisoned outputs.

Legend: T tokens, D model width, F expert width, E experts, R routed rows, R_max > R their bound.

A kernel passes when, per expert, calc_diff < 1e-5 (1e-4 with fewer than 8 rows), no error exceeds
twice the largest rounding of the reference to the kernel's dtype, rows in [R, R_max) are untouched
and a second run gives the same bits. dS (fp32) and weight gradients have the per-expert bound only;
dS is one number a row, and of fewer than 8 each is compared with what is typical of all (its error
is that of the sum it is, however much cancels).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from sonicmoe_kernels import hopper
from sonicmoe_kernels.activations import get_activation
from sonicmoe_kernels.tiles import RowTile, WeightTile
from torch import Tensor

from tests.cases import Case, Inputs, make_inputs, make_plan
from tests.oracle import (
    CALC_DIFF_BOUND,
    CALC_DIFF_BOUND_FEW_VALUES,
    ERROR_FACTOR,
    FEW_VALUES,
    calc_diff,
)

GARBAGE_ROWS = 300
GARBAGE_TOKEN = 2**30  # reading it as a row faults
KERNELS = ("up", "down", "d_hidden", "d_input")


@contextmanager
def forced_tile(kernel: str, tile: RowTile | WeightTile) -> Iterator[None]:
    """Launches `kernel` with `tile` instead of what the table picks."""
    finder = "row_gemm" if isinstance(tile, RowTile) else "weight_gemm"
    picked = getattr(hopper, finder)

    def forced(name: str, *facts: Any) -> Any:
        gemm = picked(name, *facts)
        return dataclasses.replace(gemm, tile=tile) if name == kernel else gemm

    loaded = hopper.row_kernel if isinstance(tile, RowTile) else hopper.weight_kernel
    setattr(hopper, finder, forced)
    loaded.cache_clear()
    try:
        yield
    finally:
        setattr(hopper, finder, picked)
        loaded.cache_clear()


class Problem(NamedTuple):
    """A case on the GPU: inputs in the kernels' dtype, plan padded with garbage rows."""

    case: Case
    inputs: Inputs
    token_idx_R: Tensor
    score_R: Tensor
    expert_offsets: Tensor
    bounds: list[int]

    @property
    def rows(self) -> int:
        return self.bounds[-1]

    @property
    def r_max(self) -> int:
        return self.token_idx_R.shape[0]


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """Draws the case and pads its plan: garbage tokens, NaN scores. Later draws repeat too."""
    torch.manual_seed(case.seed)
    gated = get_activation(case.activation).gated
    inputs = make_inputs(case, gated=gated, device="cuda", dtype=dtype)
    plan = make_plan(case, inputs.pairs, device="cuda")
    bounds = plan.expert_offsets.tolist()
    rows, padded = bounds[-1], bounds[-1] + GARBAGE_ROWS
    token_idx_R = torch.full((padded,), GARBAGE_TOKEN, dtype=torch.int32, device="cuda")
    score_R = torch.full((padded,), float("nan"), device="cuda")
    token_idx_R[:rows] = plan.token_idx_R[:rows]
    score_R[:rows] = plan.score_R[:rows]
    return Problem(case, inputs, token_idx_R, score_R, plan.expert_offsets, bounds)


def poisoned(problem: Problem, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of NaN, as every output is before a kernel runs."""
    dtype = dtype or problem.inputs.x_TD.dtype
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def per_expert(problem: Problem, function: Callable[[int, slice], tuple[Tensor, ...]]) -> list:
    """Concatenates over experts what `function(expert, rows)` returns, each (rows, ...)."""
    parts = []
    for expert in range(problem.case.E):
        rows = slice(problem.bounds[expert], problem.bounds[expert + 1])
        if rows.stop > rows.start:
            parts.append(function(expert, rows))
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def assert_rows(problem: Problem, name: str, got: Tensor, expected: Tensor) -> None:
    """Applies the module's bounds to one row-wise output."""
    label = f"{problem.case.name} seed {problem.case.seed} {got.dtype} {name}"
    valid = got[: problem.rows]
    assert torch.isnan(got[problem.rows :]).all(), f"{label}: wrote a row beyond R"
    assert torch.isfinite(valid).all(), f"{label}: not finite, first {first_bad(valid, expected)}"
    typical = expected.square().mean().item()
    for expert in range(problem.case.E):
        rows = slice(problem.bounds[expert], problem.bounds[expert + 1])
        count = rows.stop - rows.start
        if count:
            few = valid[rows].numel() < FEW_VALUES
            if few:  # what calc_diff of typical numbers with this error is
                diff = (valid[rows] - expected[rows]).square().max().item() / (2 * typical)
            else:
                diff = calc_diff(valid[rows], expected[rows])
            bound = CALC_DIFF_BOUND_FEW_VALUES if few else CALC_DIFF_BOUND
            where = first_bad(valid[rows], expected[rows])
            assert diff < bound, (
                f"{label}: expert {expert} of {count} rows diff {diff:.3g}, {where}"
            )
    if got.dtype != torch.float32:
        rounding = (expected.to(got.dtype).float() - expected).abs().max().item()
        error = (valid.float() - expected).abs().max().item()
        assert error <= ERROR_FACTOR * rounding, f"{label}: {error:.3g} > 2 x {rounding:.3g}"


def first_bad(got: Tensor, expected: Tensor) -> str:
    """Coordinate and values of the first far-off element."""
    off = ~((got.float() - expected).abs() <= 0.02 + 0.02 * expected.abs())
    if not off.any():
        return "no element far off"
    where = tuple(off.nonzero()[0].tolist())
    share = off.float().mean().item()
    mine, theirs = got[where].item(), expected[where].item()
    return f"at {where}: {mine:.5g} for {theirs:.5g} ({share:.1%} off)"


def check_up(problem: Problem) -> None:
    """Kernel 1."""
    x, w1, w3, *_ = problem.inputs
    case, act = problem.case, get_activation(problem.case.activation)
    f, halves = case.F, act.halves

    def reference(expert: int, rows: slice) -> tuple[Tensor, Tensor]:
        x_rD = x[problem.token_idx_R[rows].long()].float()
        weights = (w1,) if w3 is None else (w1, w3)
        h = torch.stack([x_rD @ w[expert].float().t() for w in weights], dim=1)
        return h, act.forward(h)

    def run() -> tuple[Tensor, Tensor]:
        h = poisoned(problem, problem.r_max, halves, f)
        a = poisoned(problem, problem.r_max, f)
        hopper.up(
            x, problem.token_idx_R, problem.expert_offsets, w1, w3, h, a,
            activation=problem.case.activation,
        )  # fmt: skip
        return h, a

    check(problem, ("H", "A"), run, reference)


def check_down(problem: Problem) -> None:
    """Kernel 2."""
    case, w2 = problem.case, problem.inputs.w2_EDF
    a = poisoned(problem, problem.r_max, case.F)
    a[: problem.rows].normal_()

    def reference(expert: int, rows: slice) -> tuple[Tensor]:
        return (a[rows].float() @ w2[expert].float().t(),)

    def run() -> tuple[Tensor]:
        y = poisoned(problem, problem.r_max, case.D)
        hopper.down(a, problem.expert_offsets, w2, y, activation=case.activation)
        return (y,)

    check(problem, ("Y",), run, reference)


def check_d_hidden(problem: Problem) -> None:
    """Kernel 4, also with dH written over H."""
    case, w2, dout = problem.case, problem.inputs.w2_EDF, problem.inputs.dout_TD
    act = get_activation(case.activation)
    gemm = hopper.row_gemm("d_hidden", case.D, case.F, case.E, dout.dtype, case.activation)
    h = poisoned(problem, problem.r_max, act.halves, case.F)
    h[: problem.rows].normal_()

    def reference(expert: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        token_r = problem.token_idx_R[rows].long()
        da_prime = dout[token_r].float() @ w2[expert].float()
        if gemm.relayed:
            da_prime = da_prime.to(dout.dtype).float()
        hidden, score = h[rows].float(), problem.score_R[rows, None]
        a = act.forward(hidden)
        return act.backward(score * da_prime, hidden), score * a, (da_prime * a).sum(1)

    def run(*, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        source = h.clone() if in_place else h
        dh = source if in_place else poisoned(problem, *h.shape)
        a_scaled = poisoned(problem, problem.r_max, case.F)
        parts = hopper.dscore_parts(w2, case.activation)
        dscore = poisoned(problem, parts, problem.r_max, dtype=torch.float32)
        hopper.d_hidden(
            dout, problem.token_idx_R, problem.expert_offsets, w2, problem.score_R, source, dh,
            a_scaled, dscore, activation=case.activation,
        )  # fmt: skip
        return dh, a_scaled, dscore.sum(0)

    check(problem, ("dH", "A'", "dS"), run, reference)
    for name, apart, over in zip(("dH", "A'", "dS"), run(), run(in_place=True), strict=True):
        assert same_bits(apart, over), f"{case.name} {name}: differs when dH is written over H"


def check_d_input(problem: Problem) -> None:
    """Kernel 6."""
    case, (_, w1, w3, *_) = problem.case, problem.inputs
    halves = get_activation(case.activation).halves
    dh = poisoned(problem, problem.r_max, halves, case.F)
    dh[: problem.rows].normal_()

    def reference(expert: int, rows: slice) -> tuple[Tensor]:
        weights = (w1,) if w3 is None else (w1, w3)
        return (sum(dh[rows, i].float() @ w[expert].float() for i, w in enumerate(weights)),)

    def run() -> tuple[Tensor]:
        dx = poisoned(problem, problem.r_max, case.D)
        hopper.d_input_rows(dh, problem.expert_offsets, w1, w3, dx, activation=case.activation)
        return (dx,)

    check(problem, ("dX~",), run, reference)


def check_d_weights(problem: Problem, kernel: str) -> None:
    """Kernels 5 and 7."""
    case, (x, w1, w3, w2, dout, _) = problem.case, problem.inputs
    gathered = dout if kernel == "d_weight2" else x
    outputs = (w2,) if kernel == "d_weight2" else tuple(w for w in (w1, w3) if w is not None)
    halves = len(outputs)
    scale = max(1.0, problem.rows / case.E) ** -0.5  # results of O(1)
    ordered = poisoned(problem, problem.r_max, halves, case.F)
    ordered[: problem.rows].normal_().mul_(scale)

    def run() -> list[Tensor]:
        made = [torch.full_like(w, float("nan")) for w in outputs]
        operands = (gathered, problem.token_idx_R, problem.expert_offsets)
        if kernel == "d_weight2":
            hopper.d_weight2(*operands, ordered[:, 0], *made)
        else:
            hopper.d_weight13(*operands, ordered, *made, *([None] * (2 - halves)))
        return made

    first, second = run(), run()
    for which, (one, two) in enumerate(zip(first, second, strict=True)):
        label = f"{case.name} {kernel} output {which}"
        assert same_bits(one, two), f"{label}: two runs differ"
        for expert in range(case.E):
            rows = slice(problem.bounds[expert], problem.bounds[expert + 1])
            rows_D = gathered[problem.token_idx_R[rows].long()].float()
            product = rows_D.t() @ ordered[rows, which].float()
            wanted = product if kernel == "d_weight2" else product.t()
            assert torch.isfinite(one[expert]).all(), f"{label}: expert {expert} is not finite"
            diff = calc_diff(one[expert], wanted)
            assert diff < CALC_DIFF_BOUND, f"{label}: expert {expert} diff {diff:.3g}"


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal, with NaN equal to itself."""
    return torch.equal(first.nan_to_num(nan=12345.0), second.nan_to_num(nan=12345.0))


def check(problem: Problem, names: tuple[str, ...], run: Callable, reference: Callable) -> None:
    """Runs twice, compares bits and every output with the reference."""
    first, second = run(), run()
    torch.cuda.synchronize()
    for name, one, two in zip(names, first, second, strict=True):
        assert same_bits(one, two), f"{problem.case.name} {name}: two runs differ"
    if problem.rows == 0:
        for name, got in zip(names, first, strict=True):
            assert torch.isnan(got).all(), f"{problem.case.name} {name}: wrote without rows"
        return
    expected = per_expert(problem, reference)
    for name, got, tensor in zip(names, first, expected, strict=True):
        assert_rows(problem, name, got, tensor)


CHECKS: dict[str, Callable[[Problem], None]] = {
    "up": check_up,
    "down": check_down,
    "d_hidden": check_d_hidden,
    "d_input": check_d_input,
    "d_weight2": functools.partial(check_d_weights, kernel="d_weight2"),
    "d_weight13": functools.partial(check_d_weights, kernel="d_weight13"),
}


class Launch(NamedTuple):
    """One kernel on fixed inputs of O(1), and the tensors it writes."""

    call: Callable[[], None]
    outputs: tuple[Tensor, ...]


def launchers(problem: Problem) -> dict[str, Launch]:
    """Every kernel ready to be launched again and again."""
    case, (x, w1, w3, w2, dout, _) = problem.case, problem.inputs
    halves = get_activation(case.activation).halves
    h = torch.randn((problem.r_max, halves, case.F), device="cuda").to(x.dtype)
    a, dh = torch.randn_like(h[:, 0].contiguous()), torch.randn_like(h)
    h_out, a_out = torch.empty_like(h), torch.empty_like(a)
    y = torch.empty((problem.r_max, case.D), dtype=x.dtype, device="cuda")
    parts = hopper.dscore_parts(w2, case.activation)
    dscore = torch.empty((parts, problem.r_max), device="cuda")
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    dw3 = None if w3 is None else torch.empty_like(w3)
    dw13 = tuple(w for w in (dw1, dw3) if w is not None)
    index, offsets, score = problem.token_idx_R, problem.expert_offsets, problem.score_R
    act = {"activation": case.activation}
    return {
        "up": Launch(
            lambda: hopper.up(x, index, offsets, w1, w3, h_out, a_out, **act), (h_out, a_out)
        ),
        "down": Launch(lambda: hopper.down(a, offsets, w2, y, **act), (y,)),
        "d_hidden": Launch(
            lambda: hopper.d_hidden(
                dout, index, offsets, w2, score, h, h_out, a_out, dscore, **act
            ),
            (h_out, a_out, dscore),
        ),
        "d_input": Launch(lambda: hopper.d_input_rows(dh, offsets, w1, w3, y, **act), (y,)),
        "d_weight2": Launch(lambda: hopper.d_weight2(dout, index, offsets, a, dw2), (dw2,)),
        "d_weight13": Launch(lambda: hopper.d_weight13(x, index, offsets, dh, dw1, dw3), dw13),
    }
