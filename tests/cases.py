"""One generator of expert cases for the tests and the benchmarks.

Legend: T tokens, D model width, F expert width, E experts, K experts per token, P (token, expert)
pairs, R routed rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sonicmoe_kernels.routing import RoutingPlan
from torch import Tensor

M_TILE = 128
EDGE_COUNTS = (0, 1, 63, 64, 65, 127, 128, 129)
ROUTINGS = ("balanced", "zipf", "dirichlet", "one_hot", "half_empty", "all_empty", "tile_edges")


@dataclass(frozen=True)
class Case:
    """One problem: sizes, how tokens are routed, and the seed everything is drawn from."""

    T: int
    D: int
    F: int
    E: int
    K: int
    routing: str = "balanced"
    activation: str = "swiglu"
    seed: int = 0

    @property
    def name(self) -> str:
        """A short identifier for test ids and tables."""
        sizes = f"T{self.T}_D{self.D}_F{self.F}_E{self.E}_K{self.K}"
        return f"{sizes}_{self.routing}_{self.activation}"


class Pairs(NamedTuple):
    """A routing as plain pairs; `rows_per_token` is K when every token owns exactly K."""

    token_P: Tensor
    expert_P: Tensor
    score_P: Tensor
    rows_per_token: int | None


class Inputs(NamedTuple):
    """Tensors of one case, drawn so that every output is O(1)."""

    x_TD: Tensor
    w1_EFD: Tensor
    w3_EFD: Tensor | None
    w2_EDF: Tensor
    dout_TD: Tensor
    pairs: Pairs


def _top_k_of(weights_E: Tensor, case: Case, generator: torch.Generator) -> Tensor:
    """(T, K) distinct experts per token, drawn by `weights_E` (Gumbel top-k)."""
    noise = torch.rand((case.T, len(weights_E)), generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(noise.clamp(1e-12, 1 - 1e-12)))
    return (weights_E.log() + gumbel).topk(case.K, dim=-1).indices


def _tile_edge_pairs(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Experts get counts around multiples of 64 and 128; tokens are drawn without repetition."""
    tokens, experts = [], []
    for expert in range(case.E):
        count = min(EDGE_COUNTS[expert % len(EDGE_COUNTS)], case.T)
        tokens.append(torch.randperm(case.T, generator=generator)[:count])
        experts.append(torch.full((count,), expert))
    return torch.cat(tokens), torch.cat(experts)


def make_pairs(case: Case) -> Pairs:
    """Route the case's tokens; scores are positive and sum to about 1 per token."""
    generator = torch.Generator().manual_seed(case.seed)
    uniform_E = torch.ones(case.E, dtype=torch.float64)
    fixed = True
    if case.routing == "balanced":
        experts_TK = _top_k_of(uniform_E, case, generator)
    elif case.routing == "zipf":
        ranks_E = torch.arange(1, case.E + 1, dtype=torch.float64)
        experts_TK = _top_k_of(ranks_E**-1.2, case, generator)
    elif case.routing == "dirichlet":  # concentration 2: a Gamma(2) is the sum of two Exp(1)
        uniform_2E = torch.rand((2, case.E), generator=generator, dtype=torch.float64)
        experts_TK = _top_k_of(-torch.log1p(-uniform_2E).sum(0), case, generator)
    elif case.routing == "one_hot":
        first_K = torch.arange(case.K) + case.E - case.K
        experts_TK = first_K.expand(case.T, case.K)
    elif case.routing == "half_empty":
        half = max(case.E // 2, case.K)
        experts_TK = _top_k_of(uniform_E[:half], case, generator)
    elif case.routing == "all_empty":
        experts_TK, fixed = torch.empty((case.T, 0), dtype=torch.int64), False
    elif case.routing == "tile_edges":
        token_P, expert_P = _tile_edge_pairs(case, generator)
        score_P = torch.rand(token_P.shape, generator=generator) + 0.2
        return Pairs(token_P, expert_P, score_P / case.K**0.5, None)
    else:
        raise ValueError(f"routing {case.routing!r} is unknown; accepted: {', '.join(ROUTINGS)}")
    token_P = torch.arange(case.T).repeat_interleave(experts_TK.shape[1])
    score_P = torch.rand(token_P.shape, generator=generator) + 0.2
    return Pairs(token_P, experts_TK.reshape(-1), score_P / case.K**0.5, case.K if fixed else None)


def make_inputs(
    case: Case, *, gated: bool = True, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Inputs:
    """Draw the case's tensors: x ~ N(0, 1), W ~ N(0, 1/fan_in); the pairs stay on the CPU."""
    generator = torch.Generator(device).manual_seed(case.seed + 1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return drawn.mul_(scale)

    return Inputs(
        x_TD=normal(case.T, case.D),
        w1_EFD=normal(case.E, case.F, case.D, scale=case.D**-0.5),
        w3_EFD=normal(case.E, case.F, case.D, scale=case.D**-0.5) if gated else None,
        w2_EDF=normal(case.E, case.D, case.F, scale=case.F**-0.5),
        dout_TD=normal(case.T, case.D),
        pairs=make_pairs(case),
    )


def make_plan(
    case: Case, pairs: Pairs, *, score_P: Tensor | None = None, device: str = "cpu"
) -> RoutingPlan:
    """The case's plan on `device`; `score_P` replaces the pairs' scores (to carry gradients)."""
    score_P = pairs.score_P.to(device) if score_P is None else score_P
    if pairs.rows_per_token is not None:
        shape = (case.T, case.K)
        ids_TK = pairs.expert_P.view(shape).to(device)
        return RoutingPlan.from_topk(ids_TK, score_P.view(shape), num_experts=case.E)
    return RoutingPlan.from_pairs(
        pairs.token_P.to(device),
        pairs.expert_P.to(device),
        score_P,
        num_tokens=case.T,
        num_experts=case.E,
    )


# Small cases: odd widths, K from 1 to E, one token, every routing. Fast enough for a CPU.
SMALL_CASES = (
    Case(256, 64, 64, 8, 2),
    Case(1, 64, 128, 8, 2),
    Case(300, 192, 64, 16, 4, "zipf"),
    Case(130, 64, 192, 4, 4),
    Case(257, 128, 64, 8, 1, "one_hot"),
    Case(200, 64, 64, 8, 2, "half_empty"),
    Case(40, 64, 64, 8, 2, "all_empty"),
    Case(220, 64, 64, 8, 2, "dirichlet"),
    Case(160, 128, 128, 16, 2, "tile_edges"),
    Case(300, 1024, 64, 8, 2, "zipf"),  # the narrowest D whose dH is relayed
)
ACTIVATION_CASES = tuple(
    dataclasses.replace(SMALL_CASES[0], activation=name)
    for name in ("geglu", "reglu", "silu", "relu2")
)
DRAWN_CASE = Case(700, 4096, 1024, 4, 2, "zipf")  # experts so large that units are drawn
_7B, _30B_N1024 = Case(24576, 1536, 256, 128, 8), Case(32768, 4096, 1024, 64, 4)
# Shapes whose speed is reported.
BENCHMARK_CASES = {
    # The paper's models (arXiv 2512.14080, Table 9b) and its sparse case for token rounding.
    "7b": _7B,
    "7b_n512": Case(24576, 1536, 512, 64, 4),
    "7b_n1024": Case(24576, 1536, 1024, 32, 2),
    "1.4b": Case(40960, 768, 256, 128, 8),
    "1.4b_n512": Case(40960, 768, 512, 64, 4),
    "1.4b_n1024": Case(40960, 768, 1024, 32, 2),
    "30b_n256": Case(32768, 4096, 256, 256, 16),
    "30b_n512": Case(32768, 4096, 512, 128, 8),
    "30b_n1024": _30B_N1024,
    "120b_n512": Case(32768, 4096, 512, 256, 16),
    "120b_n1024": Case(32768, 4096, 1024, 128, 8),
    "120b_n2048": Case(32768, 4096, 2048, 64, 4),
    "sparse": Case(16384, 4096, 1024, 256, 8),
    # The coarsest of its Figure 1, and the finest of its Table 9a.
    "30b_n2048": Case(32768, 4096, 2048, 32, 2),
    "1.4b_n64": Case(40960, 768, 64, 512, 32),
    "1.4b_n128": Case(40960, 768, 128, 256, 16),
    "7b_n64": Case(24576, 1536, 64, 512, 32),
    "7b_n128": Case(24576, 1536, 128, 256, 16),
    "30b_n64": Case(32768, 4096, 64, 1024, 64),
    "30b_n128": Case(32768, 4096, 128, 512, 32),
    "120b_n128": Case(32768, 4096, 128, 1024, 64),
    "120b_n256": Case(32768, 4096, 256, 512, 32),
    # Models that people train.
    "olmoe": Case(32768, 2048, 1024, 64, 8),
    "qwen3_30b": Case(32768, 2048, 768, 128, 8),
    "qwen3_next": Case(32768, 2048, 512, 512, 10),
    "qwen3_235b": Case(32768, 4096, 1536, 128, 8),
    # Few tokens, where the host shows, and uneven experts.
    "7b_t1k": dataclasses.replace(_7B, T=1024),
    "7b_t4k": dataclasses.replace(_7B, T=4096),
    "7b_zipf": dataclasses.replace(_7B, routing="zipf"),
    "7b_dirichlet": dataclasses.replace(_7B, routing="dirichlet"),
    "30b_n1024_zipf": dataclasses.replace(_30B_N1024, routing="zipf"),
    "30b_n1024_dirichlet": dataclasses.replace(_30B_N1024, routing="dirichlet"),
}
ODD_CASES = (Case(200, 7168, 64, 8, 8), Case(300, 64, 2048, 16, 3, "zipf"))
# Names for several of them, most wanted first.
BENCHMARK_GROUPS = {
    "paper": (
        *("7b", "1.4b", "30b_n1024", "30b_n256", "sparse", "7b_n512", "7b_n1024", "1.4b_n512"),
        *("1.4b_n1024", "30b_n512", "120b_n512", "120b_n1024", "120b_n2048"),
    ),
    "models": ("qwen3_30b", "olmoe", "qwen3_next", "qwen3_235b"),
    "skewed": ("7b_zipf", "7b_dirichlet", "30b_n1024_zipf", "30b_n1024_dirichlet"),
    "small": ("7b_t1k", "7b_t4k"),
    "fine": (
        *("1.4b_n64", "1.4b_n128", "7b_n64", "7b_n128", "30b_n64", "30b_n128"),
        *("120b_n128", "120b_n256"),
    ),
}
BENCHMARK_GROUPS["all"] = tuple(BENCHMARK_CASES)
