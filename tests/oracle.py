"""An independent oracle for `moe_experts`, and the check that every implementation must pass.

Legend: T tokens, D model width, F expert width, E experts, P (token, expert) pairs.

The oracle walks over the experts with ordinary autograd in fp64 (fp32 on a GPU). An implementation
passes when, for the output and every gradient,
  max |got - oracle| <= 2 max |torch in the same dtype - oracle| + max rounding of the oracle to it
and, per expert slice, 1 - 2 <x, y> / (<x, x> + <y, y>) < 1e-5 in fp64 (2e-5 for the weights of an
expert of fewer than 8 rows, 1e-4 for fewer than 8 scores: their roundings do not average out). Both
are free of scale, so zeros, swapped experts or a lost tile cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sonicmoe_kernels.activations import get_activation
from sonicmoe_kernels.moe import moe_experts
from torch import Tensor

from tests.cases import Case, Inputs, Pairs, make_inputs, make_plan

CALC_DIFF_BOUND = 1e-5
# A square doubles the relative rounding error of the stored H, from which backward recomputes A.
SQUARED_ACTIVATIONS, SQUARED_FACTOR = ("relu2",), 2
# What PyTorch's own bf16 composition reaches: grouped_mm rounds H and dA' where our kernels do not.
CALC_DIFF_BOUND_COMPOSITION = 4e-5
# One row's weight gradients, where dH is relayed: 1.12e-5 (H200, D 1536); PyTorch's own: 2.8e-5.
FEW_ROWS, FACTOR_FEW_ROWS = 8, 2
FEW_VALUES, CALC_DIFF_BOUND_FEW_VALUES = 8, 1e-4
ERROR_FACTOR = 2.0
# The largest error of a handful of elements says little about the error of others like them.
FEW_ELEMENTS, ERROR_FACTOR_FEW_ELEMENTS = 16, 4.0

Results = dict[str, Tensor]


def walk_experts(inputs: Inputs, case: Case) -> Results:
    """Output and gradients by a loop over experts with autograd, in the dtype of `inputs`."""
    gated = inputs.w3_EFD is not None
    leaves = {
        "x": inputs.x_TD,
        "w1": inputs.w1_EFD,
        **({"w3": inputs.w3_EFD} if gated else {}),
        "w2": inputs.w2_EDF,
        "score": inputs.pairs.score_P,
    }
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    act = get_activation(case.activation)
    out_TD = torch.zeros_like(leaves["x"])
    for expert in range(case.E):
        pair_p = (inputs.pairs.expert_P == expert).nonzero().squeeze(1)
        if pair_p.numel() == 0:
            continue
        token_p = inputs.pairs.token_P[pair_p]
        x_pD = leaves["x"][token_p]
        halves = [x_pD @ leaves[name][expert].t() for name in (("w1", "w3") if gated else ("w1",))]
        a_pF = act.forward(torch.stack(halves, dim=1))
        y_pD = a_pF @ leaves["w2"][expert].t()
        weighted = leaves["score"][pair_p, None].to(y_pD.dtype) * y_pD
        out_TD = out_TD.index_add(0, token_p, weighted)
    gradients = (
        torch.autograd.grad(
            out_TD, list(leaves.values()), inputs.dout_TD, allow_unused=True, materialize_grads=True
        )
        if inputs.pairs.token_P.numel()
        else [torch.zeros_like(leaf) for leaf in leaves.values()]
    )
    names = [f"d{name}" for name in leaves]
    return {"out": out_TD.detach(), **dict(zip(names, gradients, strict=True))}


def run_experts(
    inputs: Inputs, case: Case, *, backend: str = "auto", function: Callable = moe_experts
) -> Results:
    """Output and gradients of `moe_experts` (or `function`) on the device of `inputs`."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:4] if t is not None]
    score_P = inputs.pairs.score_P.detach().clone().requires_grad_()
    plan = make_plan(case, inputs.pairs, score_P=score_P, device=str(inputs.x_TD.device))
    x, w1, *w3, w2 = leaves
    out = function(
        x, w1, w3[0] if w3 else None, w2, plan, activation=case.activation, backend=backend
    )
    gradients = torch.autograd.grad(
        out, [*leaves, score_P], inputs.dout_TD, allow_unused=True, materialize_grads=True
    )
    names = ["dx", "dw1", *(["dw3"] if w3 else []), "dw2", "dscore"]
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def convert(inputs: Inputs, *, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """`inputs` with tensors in `dtype` on `device`; scores stay fp32 or wider."""
    score_dtype = dtype if dtype == torch.float64 else torch.float32
    pairs = Pairs(
        inputs.pairs.token_P.to(device),
        inputs.pairs.expert_P.to(device),
        inputs.pairs.score_P.to(device, score_dtype),
        inputs.pairs.rows_per_token,
    )
    tensors = [None if t is None else t.to(device, dtype) for t in inputs[:5]]
    return Inputs(*tensors, pairs)


def calc_diff(got: Tensor, oracle: Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in fp64; 0 when both are zero."""
    x, y = got.double().flatten(), oracle.double().flatten()
    norms = (x @ x + y @ y).item()
    return 0.0 if norms == 0 else 1 - 2 * (x @ y).item() / norms


def _first_bad(got: Tensor, oracle: Tensor, bound: float) -> str:
    error = (got.double() - oracle.double()).abs().nan_to_num(nan=float("inf"))
    index = (error > bound).nonzero()[0].tolist()
    where = tuple(index)
    return f"first at {index}: got {got[where].item():.6g}, oracle {oracle[where].item():.6g}"


def assert_matches(
    got: Results,
    oracle: Results,
    torch_run: Results,
    *,
    rows_per_expert: list[int],
    calc_diff_bound: float,
    label: str,
) -> None:
    """Apply both bounds to every tensor; the message names case, tensor, expert and coordinate."""
    for name, expected in oracle.items():
        value, in_dtype = got[name], torch_run[name].to(expected.dtype)
        assert value.shape == expected.shape, f"{label} {name}: {value.shape} != {expected.shape}"
        assert torch.isfinite(value).all(), f"{label} {name}: not finite"
        if expected.numel() == 0:
            continue
        rounded = expected.to(torch_run["out"].dtype).to(expected.dtype)
        noise = (rounded - expected).abs().max().item()
        few = expected.numel() < FEW_ELEMENTS
        factor = ERROR_FACTOR_FEW_ELEMENTS if few else ERROR_FACTOR
        allowed = (in_dtype - expected).abs().max().item() * factor + noise
        error = (value.to(expected.dtype) - expected).abs().max().item()
        if error > allowed:
            where = _first_bad(value, expected, allowed)
            raise AssertionError(f"{label} {name}: error {error:.3g} > {allowed:.3g}, {where}")
        per_expert = value.ndim == 3
        slices = zip(value, expected, strict=True) if per_expert else [(value, expected)]
        for expert, (mine, theirs) in enumerate(slices):
            bound = calc_diff_bound
            if per_expert and rows_per_expert[expert] < FEW_ROWS:
                bound *= FACTOR_FEW_ROWS
            elif mine.numel() < FEW_VALUES:
                bound = CALC_DIFF_BOUND_FEW_VALUES
            diff = calc_diff(mine, theirs)
            if not diff < bound:
                raise AssertionError(f"{label} {name}: expert {expert} calc_diff {diff:.3g}")


def check_experts(
    case: Case,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    backend: str = "auto",
    function: Callable = moe_experts,
    calc_diff_bound: float = CALC_DIFF_BOUND,
) -> None:
    """Run one case against the oracle; AssertionError when the implementation is wrong.

    The drawn numbers are rounded to `dtype` first, so that oracle and implementation start from
    the same values.
    """
    gated = get_activation(case.activation).gated
    inputs = convert(make_inputs(case, gated=gated), dtype=dtype, device=device)
    exact = convert(
        inputs, dtype=torch.float64 if device == "cpu" else torch.float32, device=device
    )
    oracle = walk_experts(exact, case)
    torch_run = walk_experts(inputs, case)
    got = run_experts(inputs, case, backend=backend, function=function)
    factor = SQUARED_FACTOR if case.activation in SQUARED_ACTIVATIONS else 1
    assert_matches(
        got,
        oracle,
        torch_run,
        rows_per_expert=inputs.pairs.expert_P.bincount(minlength=case.E).tolist(),
        calc_diff_bound=calc_diff_bound * factor,
        label=f"{case.name} seed {case.seed} {dtype}",
    )
