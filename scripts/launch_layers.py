#!/usr/bin/env python3
"""Forward and backward of whole small layers, without references: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python scripts/launch_layers.py

Every kernel of a layer runs: experts of every small case and of a wide one, with its own routing
and behind a top-k router, and token rounding in every way on the first case. Without a GPU the
torch backend runs.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from sonicmoe_kernels.activations import get_activation  # noqa: E402
from sonicmoe_kernels.moe import moe_experts  # noqa: E402
from sonicmoe_kernels.rounding import ROUNDINGS, token_rounding_plan  # noqa: E402
from sonicmoe_kernels.routing import RoutingPlan, route_topk  # noqa: E402

from tests.cases import (  # noqa: E402
    ACTIVATION_CASES,
    DRAWN_CASE,
    SMALL_CASES,
    Case,
    Pairs,
    make_inputs,
    make_plan,
)

TILE = 128  # rows of token rounding


def plans_of(
    case: Case, pairs: Pairs, logits_TE: torch.Tensor, roundings: Sequence[str]
) -> Iterator[tuple[str, RoutingPlan]]:
    """The case's own routing, and behind a router: top-k and every rounding, one at a time."""
    device = str(logits_TE.device)
    yield "given", make_plan(case, pairs, device=device)
    for rounding in ("topk", *roundings):
        routed = route_topk(logits_TE, top_k=case.K, renormalize=True)
        if rounding == "topk":
            plan = RoutingPlan.from_topk(*routed[:2], num_experts=case.E)
        else:
            plan = token_rounding_plan(*routed, rounding=rounding, tile=TILE)
        yield rounding, plan


def main() -> None:
    device, backend = ("cuda", "hopper") if torch.cuda.is_available() else ("cpu", "torch")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for number, case in enumerate((*SMALL_CASES, *ACTIVATION_CASES, DRAWN_CASE)):
        gated = get_activation(case.activation).gated
        inputs = make_inputs(case, gated=gated, device=device, dtype=dtype)
        leaves = [None if t is None else t.requires_grad_() for t in inputs[:4]]
        logits_TE = torch.randn(case.T, case.E, device=device, requires_grad=True)
        roundings = ROUNDINGS if number == 0 else ()
        for name, plan in plans_of(case, inputs.pairs, logits_TE, roundings):
            out_TD = moe_experts(*leaves, plan, activation=case.activation, backend=backend)
            wanted = [t for t in leaves if t is not None]
            wanted += [] if name == "given" else [logits_TE]
            torch.autograd.grad(out_TD, wanted, inputs.dout_TD)
            if device == "cuda":
                torch.cuda.synchronize()
            print(f"ok {backend} {case.name} {name}", flush=True)


if __name__ == "__main__":
    main()
