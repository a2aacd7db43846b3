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


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("groups", [(None, None), (4, 2)], ids=["no_groups", "groups"])
@pytest.mark.parametrize("route_norm", [False, True], ids=["raw", "renormalised"])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.filterwarnings("ignore:.*autocast")
def test_ids_scores_and_gradients_equal_stock(
    score_func: str, route_norm: bool, groups: tuple, biased: bool, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(T, E, generator=generator)
    if ties:
        logits_TE = logits_TE.round()
    logits_TE.requires_grad_()
    bias_E = 0.1 * torch.randn(E, generator=generator) if biased else None
    ids_TK, scores_TK = stock_route(
        logits_TE,
        bias_E,
        score_func=score_func,
        route_norm=route_norm,
        route_scale=2.5,
        num_expert_groups=groups[0],
        num_limited_groups=groups[1],
    )
    topk = route_topk(
        logits_TE,
        top_k=K,
        score_func=score_func,
        renormalize=route_norm,
        route_scale=2.5,
        expert_bias_E=bias_E,
        num_groups=groups[0],
        num_limited_groups=groups[1],
    )
    assert topk.ids_TK.equal(ids_TK)
    assert topk.scores_TK.equal(scores_TK)
    gradients = [torch.autograd.grad(s.square().sum(), logits_TE) for s in (topk[1], scores_TK)]
    torch.testing.assert_close(*gradients)
