"""Cases of the router's top-k kernels, and what they must compute, in plain torch.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sonicmoe_kernels.backends import Backend
from sonicmoe_kernels.routing import TopK, route_topk
from sonicmoe_kernels.tiles import RENORMALIZE_EPS, TopKBackward, TopKForward
from torch import Tensor

SCALE = 2.5
ROUTING = {
    "before": ("softmax", "before", False),
    "before_renormalised": ("softmax", "before", True),
    "after": ("softmax", "after", False),
    "sigmoid": ("sigmoid", "before", False),
    "sigmoid_renormalised": ("sigmoid", "before", True),
}
GRADIENTS = {"weights": (True, False), "scores": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Case:
    """One routing of T tokens; T is no part of what is compiled."""

    num_experts: int
    top_k: int
    routing: str = "before_renormalised"
    biased: bool = False
    dtype: torch.dtype = torch.float32
    all_scores: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        flags = [name for name in ("biased", "all_scores") if getattr(self, name)]
        return "-".join([f"E{self.num_experts}", f"K{self.top_k}", self.routing, dtype, *flags])

    @property
    def options(self) -> dict[str, Any]:
        score_func, softmax_order, renormalize = ROUTING[self.routing]
        return dict(score_func=score_func, softmax_order=softmax_order, renormalize=renormalize)

    @property
    def gradients(self) -> list[str]:
        """Which outputs can have one."""
        return list(GRADIENTS) if self.all_scores else ["weights"]

    def specs(self, gradients: Iterable[str] = ()) -> list[TopKForward | TopKBackward]:
        """What `route_topk` compiles, and its backward for these gradients."""
        static: dict[str, Any] = dict(
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=str(self.dtype).removeprefix("torch."),
            has_bias=self.biased,
            **self.options,
        )
        forward = TopKForward(**static, all_scores=self.all_scores)
        flags = [GRADIENTS[name] for name in gradients]
        return [forward, *(TopKBackward(**static, d_weights=w, d_all=a) for w, a in flags)]

    def logits(self, num_tokens: int, *, seed: int = 0, spread: float = 3.0) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        shape = (num_tokens, self.num_experts)
        logits_TE = torch.randn(shape, generator=generator, device="cuda") * spread
        return logits_TE.to(self.dtype)

    def bias(self) -> Tensor | None:
        return _drawn_bias(self.num_experts) if self.biased else None

    def route(self, logits_TE: Tensor, *, backend: Backend = "hopper") -> TopK:
        return route_topk(
            logits_TE,
            top_k=self.top_k,
            route_scale=SCALE,
            expert_bias_E=self.bias(),
            all_scores=self.all_scores,
            backend=backend,
            **self.options,
        )

    def score_all(self, logits_TE: Tensor) -> Tensor:
        """(T, E) scores without the route scale."""
        if self.options["score_func"] == "sigmoid":
            return logits_TE.sigmoid()
        return logits_TE.softmax(dim=-1)

    def choice_values(self, logits_TE: Tensor) -> Tensor:
        """(T, E) what the choice compares."""
        bias_E = self.bias()
        if bias_E is None:
            return logits_TE
        after = self.options["softmax_order"] == "after"
        return (logits_TE if after else self.score_all(logits_TE)) + bias_E

    def weights_of(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """(T, K) weights of given experts, in the dtype of the logits."""
        if self.options["softmax_order"] == "after":
            return SCALE * logits_TE.gather(1, ids_TK).softmax(dim=-1)
        weights_TK = self.score_all(logits_TE).gather(1, ids_TK)
        if self.options["renormalize"]:
            total_T1 = weights_TK.sum(dim=-1, keepdim=True)
            weights_TK = weights_TK / (total_T1 + RENORMALIZE_EPS)
        return SCALE * weights_TK

    def gradient(
        self, logits_TE: Tensor, ids_TK: Tensor, dweights: Tensor | None, dscores: Tensor | None
    ) -> Tensor:
        """(T, E) float64 gradient of the logits by autograd."""
        exact_TE = logits_TE.detach().double().requires_grad_()
        loss = exact_TE.sum() * 0
        if dweights is not None:
            loss = loss + (self.weights_of(exact_TE, ids_TK) * dweights).sum()
        if dscores is not None:
            loss = loss + (SCALE * self.score_all(exact_TE) * dscores).sum()
        return torch.autograd.grad(loss, exact_TE)[0]


@functools.cache  # a graph under capture may not draw with a generator of its own
def _drawn_bias(num_experts: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(num_experts, generator=generator, device="cuda") / 5


def sort_by_loop(values: list[float], top_k: int) -> list[int]:
    """The K greatest, the greatest first; of equals the lowest index (Python's sort is stable)."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:top_k]


SIZES = ((1, 1), (2, 2), (7, 3), (16, 16), (64, 6), (96, 8), (128, 8), (128, 32), (200, 8))
SIZES += ((256, 16), (512, 8), (1000, 10), (1024, 32), (4096, 8), (4096, 32))
DTYPES = (torch.float32, torch.bfloat16)

# Every option where lanes sort their experts (128) and where the warp searches (512); two routings
# at every other size.
OPTION_CASES = [
    Case(num_experts, 8, routing, biased, dtype, all_scores)
    for num_experts, dtype, all_scores in (
        (128, torch.float32, True),
        (128, torch.float32, False),
        (128, torch.bfloat16, True),
        (512, torch.float32, True),
    )
    for routing, biased in itertools.product(ROUTING, (False, True))
]
SIZE_CASES = [
    Case(num_experts, top_k, routing, biased)
    for num_experts, top_k in SIZES
    for routing, biased in (("before_renormalised", False), ("sigmoid_renormalised", True))
]
CASES = list(dict.fromkeys([*OPTION_CASES, *SIZE_CASES]))
GRADIENT_CASES = list(
    dict.fromkeys(
        [(case, name) for case in OPTION_CASES for name in case.gradients]
        + [(case, "both") for case in SIZE_CASES]
    )
)


def all_specs() -> list[TopKForward | TopKBackward]:
    """What the tests compile, to be built beforehand in several processes."""
    wanted = [spec for case in CASES for spec in case.specs()]
    wanted += [spec for case, name in GRADIENT_CASES for spec in case.specs([name])]
    return list(dict.fromkeys(wanted))
