"""Token choice decides and weighs as TorchTitan's own router does.

Legend: T tokens, E experts, K experts per token.
"""

import pytest
import torch
from sonicmoe_kernels.routing import route_topk
from torch import Tensor

moe = pytest.importorskip("torchtitan.models.common.moe")
linear = pytest.importorskip("torchtitan.models.common.linear")

T, E, K = 200, 16, 4


def stock_route(logits_TE: Tensor, bias_E: Tensor | None, **config) -> tuple[Tensor, Tensor]:
    """Stock's ids_TK and scores_TK for these logits: its gate is made the identity."""
    gate = linear.Linear.Config(in_features=E, out_features=E)
    router = moe.TokenChoiceTopKRouter.Config(num_experts=E, top_k=K, gate=gate, **config).build()
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(E))
    scores_BLK, ids_BLK, _ = router(logits_TE.unsqueeze(0), bias_E)
    return ids_BLK[0], scores_BLK[0]


def both_routes(
    logits_TE: Tensor, bias_E: Tensor | None, groups: tuple, *, score_func: str, route_norm: bool
) -> list[tuple[Tensor, Tensor]]:
    """(ids_TK, scores_TK) of stock and of ours."""
    stock = stock_route(
        logits_TE,
        bias_E,
        score_func=score_func,
        route_norm=route_norm,
        route_scale=2.5,
        num_expert_groups=groups[0],
        num_limited_groups=groups[1],
    )
    ours = route_topk(
        logits_TE,
        top_k=K,
        score_func=score_func,
        renormalize=route_norm,
        route_scale=2.5,
        expert_bias_E=bias_E,
        num_groups=groups[0],
        num_limited_groups=groups[1],
    )
    return [stock, (ours.ids_TK, ours.scores_TK)]


@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("groups", [(None, None), (4, 2)], ids=["no_groups", "groups"])
@pytest.mark.parametrize("route_norm", [False, True], ids=["raw", "renormalised"])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.filterwarnings("ignore:.*autocast")
def test_choice_scores_and_gradients_equal_stock(
    score_func: str, route_norm: bool, groups: tuple, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(T, E, generator=generator).requires_grad_()
    bias_E = 0.1 * torch.randn(E, generator=generator) if biased else None
    routes = both_routes(logits_TE, bias_E, groups, score_func=score_func, route_norm=route_norm)
    dense = [torch.zeros(T, E).scatter(1, ids_TK, scores_TK) for ids_TK, scores_TK in routes]
    torch.testing.assert_close(*dense)
    assert dense[0].bool().equal(dense[1].bool())
    gradients = [torch.autograd.grad(scores.square().sum(), logits_TE) for _, scores in routes]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.filterwarnings("ignore:.*autocast")
def test_equal_logits_choose_as_good_experts_as_stock(score_func: str) -> None:
    """Which of them, stock leaves to torch.topk."""
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).round()
    routes = both_routes(logits_TE, None, (None, None), score_func=score_func, route_norm=False)
    chosen = [logits_TE.gather(1, ids_TK).sort(dim=1).values for ids_TK, _ in routes]
    assert chosen[0].equal(chosen[1])
