"""The router benchmark's own pieces: the paper's rounding in torch operations, and padding."""

from __future__ import annotations

import pytest
import torch
from bench.router_worker import padding_waste, rounded_pairs
from sonicmoe_kernels.routing import route_topk, token_rounding_plan

T, D, E, K, TILE = 1024, 32, 16, 2, 128


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn((T, D), generator=generator, dtype=torch.float64)
    gate_ED = torch.randn((E, D), generator=generator, dtype=torch.float64) * D**-0.5
    return x_TD, gate_ED.requires_grad_()


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_peers_rounding_gives_experts_as_many_rows_as_ours(rounding: str) -> None:
    x_TD, gate_ED = _inputs()
    score, token, expert = rounded_pairs(x_TD, gate_ED, top_k=K, rounding=rounding)
    routed = route_topk(x_TD @ gate_ED.detach().T, top_k=K, renormalize=True)
    plan = token_rounding_plan(*routed, rounding=rounding, tile=TILE)
    assert expert.bincount(minlength=E).tolist() == plan.expert_offsets.diff().tolist()
    assert token.tolist() == sorted(token.tolist())
    assert score.requires_grad
    expert_R = torch.arange(E).repeat_interleave(plan.expert_offsets.diff())
    ours = _scores(plan.token_idx_R, expert_R, plan.score_R)
    theirs = _scores(token, expert, score.detach())
    assert len(theirs) == len(score)
    # Who is dropped differs: the paper's benchmark ranks renormalised scores, ours the scores.
    shared = theirs.keys() & ours.keys()
    assert len(shared) > 0.9 * len(ours) and (rounding != "up" or shared == ours.keys())
    assert {pair: theirs[pair] for pair in shared} == pytest.approx(
        {pair: ours[pair] for pair in shared}, abs=1e-6
    )


def _scores(
    token: torch.Tensor, expert: torch.Tensor, score: torch.Tensor
) -> dict[tuple[int, int], float]:
    rows = len(expert)
    pairs = zip(token[:rows].tolist(), expert.tolist(), strict=True)
    return dict(zip(pairs, score[:rows].tolist(), strict=True))


def test_padding_counts_rows_of_whole_tiles() -> None:
    assert padding_waste(torch.tensor([0, 128, 256])) == 0
    assert padding_waste(torch.tensor([1, 127])) == pytest.approx(1.0)
