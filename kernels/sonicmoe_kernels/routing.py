"""Routers: token choice (top-k) and token rounding, as pure functions on local tensors.

Legend: T tokens, E experts, G expert groups, K experts per token, R routed rows.

Nothing here synchronises with the host; everything traces under ``torch.compile(fullgraph=True)``
and captures in a CUDA graph. Arithmetic is float32 (float64 if given float64).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sonicmoe_kernels import routing_ops
from sonicmoe_kernels.backends import Backend, resolve_topk_backend
from sonicmoe_kernels.plan import RoutingPlan
from sonicmoe_kernels.rounding import ROUNDINGS, Rounding, rounding_r_max, token_rounding_plan
from sonicmoe_kernels.tiles import RENORMALIZE_EPS

__all__ = [
    "RENORMALIZE_EPS",
    "ROUNDINGS",
    "Rounding",
    "RoutingPlan",
    "TopK",
    "r_max",
    "route_topk",
    "token_rounding_plan",
]


class TopK(NamedTuple):
    """A token-choice routing.

    Attributes:
        ids_TK: (T, K) int64 experts, distinct, the best first.
        scores_TK: (T, K) combine weights, with gradient.
        scores_TE: (T, E) every expert's raw score times the route scale, with gradient; -inf where
            token rounding may not add the pair (outside the token's expert groups). (T, 0) where
            nobody asked for it.
    """

    ids_TK: Tensor
    scores_TK: Tensor
    scores_TE: Tensor


def route_topk(
    logits_TE: Tensor,
    *,
    top_k: int,
    score_func: Literal["softmax", "sigmoid"] = "softmax",
    softmax_order: Literal["before", "after"] = "before",
    renormalize: bool,
    route_scale: float = 1.0,
    expert_bias_E: Tensor | None = None,
    num_groups: int | None = None,
    num_limited_groups: int | None = None,
    all_scores: bool = True,
    backend: Backend = "auto",
) -> TopK:
    """Send every token to its K best experts.

    The choice is made on the scores (on the logits with ``softmax_order="after"``) plus the bias,
    within each token's best groups; the scores that weight the experts' outputs never see the bias.
    Without bias and groups it is made on the logits, which order the experts as their scores do but
    tell apart what rounds to one score. Of equal values (0 and -0 among them) the lowest expert
    wins. A token with a NaN among its logits gets K distinct experts, no matter which.

    On a Hopper GPU one kernel does all of it, one warp a token, and one its backward; with groups,
    and elsewhere, it is composed of torch's operations. Both choose alike, except where a bias is
    added to scores that they round differently. A second derivative is for torch's alone.

    Args:
        logits_TE: (T, E) router logits, any float dtype.
        top_k: K.
        score_func: what turns logits into scores.
        softmax_order: "before" takes the softmax over all experts and selects from it; "after"
            selects logits and takes the softmax over the K selected, which sum to 1 by themselves.
        renormalize: divide a token's K scores by their sum.
        route_scale: factor on all scores, after renormalisation.
        expert_bias_E: (E,) added for the choice alone (auxiliary-loss-free load balancing).
        num_groups: G; experts fall into G equal groups, and a token uses only its best groups. A
            group's value is the sum of its two best experts.
        num_limited_groups: how many groups a token may use; given with ``num_groups``.
        all_scores: whether ``scores_TE`` is needed (token rounding, auxiliary losses).
        backend: "auto" picks by device; "hopper" or "torch" insist (groups take torch's way).

    Raises:
        ValueError: a shape, count or option that is not accepted, a backend that cannot serve them.
    """
    _check_route_topk(
        logits_TE,
        top_k=top_k,
        score_func=score_func,
        softmax_order=softmax_order,
        route_scale=route_scale,
        expert_bias_E=expert_bias_E,
        num_groups=num_groups,
        num_limited_groups=num_limited_groups,
    )
    chosen_backend = resolve_topk_backend(
        backend, logits_TE.device, logits_TE.dtype, logits_TE.shape[1], top_k
    )
    if chosen_backend == "hopper" and num_groups is None:
        bias_E = None if expert_bias_E is None else expert_bias_E.detach().float()
        return TopK(
            *routing_ops.route_topk(
                logits_TE,
                bias_E,
                top_k,
                score_func,
                softmax_order,
                renormalize,
                route_scale,
                all_scores,
            )
        )
    logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    scores_TE = logits_TE.sigmoid() if score_func == "sigmoid" else logits_TE.softmax(dim=-1)

    on_logits = softmax_order == "after" or (expert_bias_E is None and num_groups is None)
    choice_TE = logits_TE.detach() if on_logits else scores_TE.detach()
    if expert_bias_E is not None:
        choice_TE = choice_TE + expert_bias_E.detach()
    outside_TE = None
    if num_groups is not None and num_limited_groups is not None:
        outside_TE = _outside_best_groups(
            choice_TE, num_groups=num_groups, num_limited_groups=num_limited_groups
        )
        choice_TE = choice_TE.masked_fill(outside_TE, float("-inf"))
    ids_TK = _best(choice_TE, top_k)

    if softmax_order == "after":
        scores_TK = logits_TE.gather(1, ids_TK).softmax(dim=-1)
    else:
        scores_TK = scores_TE.gather(1, ids_TK)
        if renormalize:
            scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + RENORMALIZE_EPS)
    scores_TK = scores_TK * route_scale
    if not all_scores:
        return TopK(ids_TK, scores_TK, scores_TE.new_empty((len(scores_TE), 0)))
    scores_TE = scores_TE * route_scale
    if outside_TE is not None:
        scores_TE = scores_TE.masked_fill(outside_TE, float("-inf"))
    return TopK(ids_TK, scores_TK, scores_TE)


def r_max(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    router: Literal["topk", "token_rounding"] = "topk",
    rounding: Rounding | None = None,
    tile: int | None = None,
) -> int:
    """Static bound on the rows of a plan: the length of its row tensors.

    Top-k and "down" never exceed T * K. Rounding to the nearest adds at most half a tile to an
    expert, always rounding up all but one row of a tile, and "balance" half a tile to all experts
    together. No routing exceeds T * E, where every token is on every expert.

    Raises:
        ValueError: an unknown router or rounding, a tile outside [1, num_tokens].
    """
    if router not in ("topk", "token_rounding"):
        raise ValueError(f"router is {router!r}; accepted: 'topk', 'token_rounding'")
    rows = num_tokens * top_k
    if router == "topk":
        return rows
    return rounding_r_max(rows, num_tokens, num_experts, rounding=rounding, tile=tile)


def _best(value_TE: Tensor, top_k: int) -> Tensor:
    """(T, K) columns of each row's greatest values, the greatest first, of equals the leftmost."""
    if value_TE.dtype == torch.float64:
        return value_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    # A key of 64 bits is unique in its row, so that topk has no choice between equals: the value's
    # bits as an integer of the same order (both zeros are 0), and below them the column from right.
    bits_TE = value_TE.contiguous().view(torch.int32).long()
    order_TE = torch.where(bits_TE < 0, -(2**31) - bits_TE, bits_TE)
    E = value_TE.shape[1]
    from_right_E = torch.arange(E - 1, -1, -1, device=value_TE.device)
    return (order_TE * 2**32 + from_right_E).topk(top_k, dim=-1).indices


def _outside_best_groups(choice_TE: Tensor, *, num_groups: int, num_limited_groups: int) -> Tensor:
    """(T, E) bool: True where the expert is in none of its token's best groups."""
    E = choice_TE.shape[1]
    choice_TGe = choice_TE.unflatten(-1, (num_groups, E // num_groups))
    value_TG = choice_TGe.topk(2, dim=-1).values.sum(dim=-1)
    best_Tg = value_TG.topk(num_limited_groups, dim=-1, sorted=False).indices
    outside_TG = torch.ones_like(value_TG, dtype=torch.bool).scatter(1, best_Tg, False)
    return outside_TG.repeat_interleave(E // num_groups, dim=-1)


def _check_route_topk(
    logits_TE: Tensor,
    *,
    top_k: int,
    score_func: str,
    softmax_order: str,
    route_scale: float,
    expert_bias_E: Tensor | None,
    num_groups: int | None,
    num_limited_groups: int | None,
) -> None:
    if logits_TE.ndim != 2 or not logits_TE.dtype.is_floating_point:
        raise ValueError(
            f"router logits are {logits_TE.dtype} of shape {tuple(logits_TE.shape)}; "
            "they must be floating-point of shape (T, E)"
        )
    E = logits_TE.shape[1]
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k is {top_k}; it must lie in [1, number of experts = {E}]")
    if score_func not in ("softmax", "sigmoid"):
        raise ValueError(f"score_func is {score_func!r}; accepted: 'softmax', 'sigmoid'")
    if softmax_order not in ("before", "after"):
        raise ValueError(f"softmax_order is {softmax_order!r}; accepted: 'before', 'after'")
    if score_func == "sigmoid" and softmax_order == "after":
        raise ValueError(
            "softmax_order='after' has no meaning with score_func='sigmoid'; use 'before'"
        )
    if not route_scale > 0:
        raise ValueError(f"route_scale is {route_scale}; it must be above 0")
    if expert_bias_E is not None and expert_bias_E.shape != (E,):
        raise ValueError(f"expert_bias_E is {tuple(expert_bias_E.shape)}; it must be (E,) = ({E},)")
    if (num_groups is None) != (num_limited_groups is None):
        raise ValueError(
            f"num_groups is {num_groups} and num_limited_groups is {num_limited_groups}; "
            "give both or neither"
        )
    if num_groups is None or num_limited_groups is None:
        return
    if num_groups < 1 or E % num_groups or E // num_groups < 2:
        raise ValueError(
            f"num_groups is {num_groups}; it must divide the {E} experts into groups of at least 2"
        )
    if not 1 <= num_limited_groups <= num_groups:
        raise ValueError(
            f"num_limited_groups is {num_limited_groups}; it must lie in [1, num_groups = "
            f"{num_groups}]"
        )
    if num_limited_groups * (E // num_groups) < top_k:
        raise ValueError(
            f"{num_limited_groups} groups of {E // num_groups} experts hold fewer experts than "
            f"top_k = {top_k}; raise num_limited_groups"
        )
