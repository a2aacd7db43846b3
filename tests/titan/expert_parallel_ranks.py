"""Expert parallelism on two ranks against all experts on one, with forced routings.

Runs on the ranks of a launch. Each case returns the greatest deviations of output and gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan, token_rounding_plan
from torch import Tensor

from sonicmoe_titan.expert_parallel import expert_parallel

T, D, F, E, K, TILE = 24, 16, 8, 4, 2, 4


def _routing(case: str, rank: int) -> Tensor:
    """(T, K) experts of this rank's tokens."""
    generator = torch.Generator().manual_seed(rank)
    if case == "all to rank 0":
        return torch.tensor([0, 1]).expand(T, K).contiguous()
    if case == "rank 0 to itself, rank 1 to rank 0":
        return torch.tensor([1, 0]).expand(T, K).contiguous()
    if case == "one expert":
        return torch.tensor([3, 0]).expand(T, K).contiguous()
    return torch.rand(T, E, generator=generator).topk(K, dim=1).indices


def _compare(
    case: str, *, num_experts: int = E, redispatch_x: bool = False, tokens: int = T
) -> Any:
    rank, W = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(10 + rank)
    weight_generator = torch.Generator().manual_seed(1)
    ids_TK = _routing(case, rank)[:tokens] % num_experts
    if num_experts < E:
        ids_TK = ids_TK[:, :1]
    x_TD, dout_TD = torch.randn(2, tokens, D, generator=generator, dtype=torch.float64)
    scores_TK = torch.rand(ids_TK.shape, generator=generator, dtype=torch.float64)
    shapes = ((num_experts, F, D), (num_experts, F, D), (num_experts, D, F))
    weights = [torch.randn(s, generator=weight_generator, dtype=torch.float64) for s in shapes]

    def differentiate(run: Callable[..., Tensor], parts: list[Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x_TD, scores_TK, *parts)]
        plan = RoutingPlan.from_topk(ids_TK, leaves[1], num_experts=num_experts)
        out_TD = run(leaves[0], leaves[2:], plan)
        return [out_TD, *torch.autograd.grad(out_TD, leaves, dout_TD)]

    def alone(x_TD: Tensor, w: list[Tensor], plan: RoutingPlan) -> Tensor:
        return moe_experts(x_TD, w[0], w[1], w[2], plan, backend="torch")

    def together(x_TD: Tensor, w: list[Tensor], plan: RoutingPlan) -> Tensor:
        return expert_parallel(
            x_TD,
            plan,
            lambda x, p: alone(x, w, p),
            group=dist.group.WORLD,
            redispatch_x=redispatch_x,
        )

    expected = differentiate(alone, weights)
    e = num_experts // W
    mine = slice(rank * e, (rank + 1) * e)
    actual = differentiate(together, [w[mine] for w in weights])
    for gradient in expected[3:]:  # weights see the tokens of all ranks
        dist.all_reduce(gradient)
    expected[3:] = [gradient[mine] for gradient in expected[3:]]
    names = ("out", "dx", "dscores", "dw1", "dw3", "dw2")
    return {
        name: (a - b).abs().max().item() for name, a, b in zip(names, actual, expected, strict=True)
    }


def uneven() -> Any:
    return _compare("random")


def all_to_one_rank() -> Any:
    return _compare("all to rank 0")


def one_local_expert() -> Any:
    return _compare("random", num_experts=2)


def one_expert_per_rank_in_use() -> Any:
    return _compare("one expert")


def sent_again_in_backward() -> Any:
    return _compare("random", redispatch_x=True)


def a_rank_without_tokens_of_its_own() -> Any:
    return _compare("random", tokens=T if dist.get_rank() == 0 else 1)


def whole_tiles_at_the_receiver() -> list[int]:
    """Rows per local expert that this rank receives, each sender having rounded its own."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    scores_TE = torch.rand(T, E, generator=generator).softmax(dim=1)
    scores_TK, ids_TK = scores_TE.topk(K, dim=1)
    plan = token_rounding_plan(ids_TK, scores_TK, scores_TE, rounding="nearest", tile=TILE)
    received: list[int] = []

    def experts(x: Tensor, plan_recv: RoutingPlan) -> Tensor:
        received.extend(plan_recv.expert_offsets.diff().tolist())
        return x

    expert_parallel(torch.randn(T, D), plan, experts, group=dist.group.WORLD)
    return received


def rows_travel_once() -> dict[str, int]:
    """Tokens received against the distinct (sender, token) pairs that this rank's experts serve."""
    rank, W = dist.get_rank(), dist.get_world_size()
    ids_TK = _routing("random", rank)
    plan = RoutingPlan.from_topk(ids_TK, torch.ones(T, K), num_experts=E)
    seen = {}

    def experts(x: Tensor, plan_recv: RoutingPlan) -> Tensor:
        seen["received"] = x.shape[0]
        return x

    expert_parallel(torch.randn(T, D), plan, experts, group=dist.group.WORLD)
    mine = rank * (E // W), (rank + 1) * (E // W)
    seen["expected"] = sum(
        int(((_routing("random", r) >= mine[0]) & (_routing("random", r) < mine[1])).any(1).sum())
        for r in range(W)
    )
    return seen


def saved_bytes() -> dict[str, int]:
    """Bytes that autograd keeps of (V, D) tensors, with and without redispatch_x."""
    rank = dist.get_rank()
    ids_TK = _routing("random", rank)
    kept = {}
    for redispatch_x in (False, True):
        x_TD = torch.randn(T, D, requires_grad=True)
        w1, w3, w2 = (torch.randn(s) for s in ((2, F, D), (2, F, D), (2, D, F)))
        plan = RoutingPlan.from_topk(ids_TK, torch.rand(T, K), num_experts=E)
        sizes: dict[int, int] = {}

        def note(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if t.ndim == 2 and t.shape[1] == D and t.dtype == torch.float32:
                sizes[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            expert_parallel(
                x_TD,
                plan,
                lambda x, p, w=(w1, w3, w2): moe_experts(x, *w, p, backend="torch"),
                group=dist.group.WORLD,
                redispatch_x=redispatch_x,
            ).sum().backward()
        kept["again" if redispatch_x else "once"] = sum(sizes.values())
    return kept


FUNCTIONS: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        uneven,
        all_to_one_rank,
        one_local_expert,
        one_expert_per_rank_in_use,
        sent_again_in_backward,
        a_rank_without_tokens_of_its_own,
        whole_tiles_at_the_receiver,
        rows_travel_once,
        saved_bytes,
    )
}
