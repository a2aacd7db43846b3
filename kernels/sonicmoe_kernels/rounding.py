"""Token rounding: top-k routing whose every expert gets a multiple of a tile of rows.

After Alg. 4 and Alg. 6 of SonicMoE (arXiv 2512.14080). Token choice comes first; then each expert
either drops its worst rows down to a multiple of the tile or adds tokens that did not choose it.
At most one tile per expert changes, and a GEMM over the rows pads nothing.

Legend: T tokens, E experts, K experts per token, R routed rows (suffix R: R_max entries).
``TE`` and ``ET`` are the same pairs, token-major and expert-major.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sonicmoe_kernels import plan_ops
from sonicmoe_kernels.backends import Backend, resolve_plan_backend
from sonicmoe_kernels.plan import RoutingPlan

Rounding = Literal["nearest", "stochastic", "score_stochastic", "balance", "up", "down"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
STOCHASTIC = ("stochastic", "score_stochastic")  # those that draw


def token_rounding_plan(
    ids_TK: Tensor,
    scores_TK: Tensor,
    scores_TE: Tensor,
    *,
    rounding: Rounding,
    tile: int,
    uniform_E: Tensor | None = None,
    backend: Backend = "auto",
) -> RoutingPlan:
    """Round a top-k routing so that every expert's row count is a multiple of ``tile``.

    Per expert, the tokens that chose it are ranked first, then the others, each part by descending
    ``scores_TE``, equal scores by ascending token: a sort on the pair, since the paper's way of
    writing it (subtract 1 from the scores of the others) rounds small probabilities into ties. Of
    this order, with f tokens that chose the expert, the first floor(f / tile) * tile or
    ceil(f / tile) * tile stay. The ranking is detached; gradients reach the scores that the plan's
    rows carry: ``scores_TK`` for a pair that its token chose, ``scores_TE`` for an added one.

    Which of the two counts:
        "nearest": the nearer one; the lower one if f is half way.
        "stochastic": the upper one with probability (f mod tile) / tile.
        "score_stochastic": the upper one with probability a / (a + b), where a sums the scores that
            going down would drop and b those that going up would add; never if a + b is 0.
        "balance": expert after expert, the one that keeps the running sum of changes nearer to 0,
            the lower one if they are equally near. The sum ends within tile / 2 of 0 unless an
            expert could not go up.
        "up", "down": always that one.
    Where the upper count needs more tokens than may be added (there are T, and ``scores_TE`` may
    forbid some), the lower one is taken whatever the variant says.

    Args:
        ids_TK: (T, K) int64 experts, distinct within one token.
        scores_TK: (T, K) float scores of the chosen pairs.
        scores_TE: (T, E) float raw scores of all pairs; -inf marks a pair that must not be added.
        rounding: the variant.
        tile: rows per tile, at most T.
        uniform_E: (E,) draws in [0, 1) for the two stochastic variants, which draw from torch's
            default generator if None; the others ignore it.
        backend: "hopper" (three kernel launches, "balance" four), "torch" (the same plan from
            torch's own ops), or "auto": hopper where it can serve these tensors.

    Returns:
        A plan whose row tensors have the length that ``r_max`` states.

    Raises:
        ValueError: an unknown variant, a tile outside [1, T], shapes that do not fit, 2**31 pairs
            (T * E) or more, a backend that is unknown or cannot run here.
    """
    T, E = _check_rounding(ids_TK, scores_TK, scores_TE, rounding, tile, uniform_E)
    if rounding not in STOCHASTIC:
        uniform_E = None
    elif uniform_E is None:
        uniform_E = torch.rand(E, device=scores_TE.device)
    else:
        uniform_E = uniform_E.to(torch.promote_types(uniform_E.dtype, torch.float32))
    floats = [t for t in (scores_TK, scores_TE, uniform_E) if t is not None]
    if resolve_plan_backend(backend, ids_TK, E, *floats) == "torch":
        return _plan_by_sorting(ids_TK, scores_TK, scores_TE, rounding, tile, uniform_E)
    tensors = plan_ops.rounding_plan(
        ids_TK,
        scores_TK.float(),
        scores_TE.float(),
        uniform_E,
        rounding,
        tile,
        rounding_r_max(ids_TK.numel(), T, E, rounding=rounding, tile=tile),
    )
    return RoutingPlan(*tensors[:5], rows_per_token=None, num_tokens=T)


def _plan_by_sorting(
    ids_TK: Tensor,
    scores_TK: Tensor,
    scores_TE: Tensor,
    rounding: Rounding,
    tile: int,
    uniform_E: Tensor | None,
) -> RoutingPlan:
    """`token_rounding_plan` from torch's own ops, in any float dtype: what kernels must equal."""
    T, E = scores_TE.shape
    dtype = torch.promote_types(
        torch.promote_types(scores_TK.dtype, scores_TE.dtype), torch.float32
    )
    scores_TK, scores_TE = scores_TK.to(dtype), scores_TE.to(dtype)
    ids_TK = ids_TK.long()

    chosen_TE = torch.zeros(T, E, dtype=torch.bool, device=ids_TK.device).scatter(1, ids_TK, True)
    ranking = _rank(chosen_TE.t().contiguous(), scores_TE.detach().t().contiguous())
    rows_E = _round_counts(ranking, rounding=rounding, tile=tile, uniform_E=uniform_E)
    kept_ET = _keep_first(ranking, rows_E)

    # Row r is the r-th kept pair in expert-major order; rows beyond R find no pair and are clamped.
    bound = rounding_r_max(ids_TK.numel(), T, E, rounding=rounding, tile=tile)
    rank_P = kept_ET.flatten().cumsum(0, dtype=torch.int32)
    row_R = torch.arange(1, bound + 1, device=ids_TK.device, dtype=torch.int32)
    pair_R = torch.searchsorted(rank_P, row_R).clamp(max=T * E - 1)
    token_R = pair_R % T
    return RoutingPlan.from_rows(
        token_R,
        F.pad(rows_E.cumsum(0), (1, 0)),
        scores_TE.scatter(1, ids_TK, scores_TK).flatten(),
        token_R * E + pair_R // T,
        num_tokens=T,
    )


def rounding_r_max(
    topk_rows: int, num_tokens: int, num_experts: int, *, rounding: str | None, tile: int | None
) -> int:
    """Rows that token rounding can reach from ``topk_rows`` = T * K rows; see ``routing.r_max``."""
    rounding, tile = _check_variant(num_tokens, rounding, tile)
    added = {
        "nearest": num_experts * (tile // 2),
        "balance": tile // 2,
        "down": 0,
    }.get(rounding, num_experts * (tile - 1))
    return min(num_tokens * num_experts, topk_rows + added)


class _Ranking(NamedTuple):
    """Each expert's tokens by descending score. Suffix ET here: column j is the j-th in that order.

    Attributes:
        token_ET: (E, T) int64, the token.
        score_ET: (E, T) its raw score.
        chosen_ET: (E, T) bool, the token chose the expert.
        place_ET: (E, T) int32, its 1-based place once those who chose the expert go first; above
            every possible count where the pair must not be added.
        chosen_E: (E,) int64, f: how many chose the expert.
        addable_E: (E,) int64, how many more the expert could get.
    """

    token_ET: Tensor
    score_ET: Tensor
    chosen_ET: Tensor
    place_ET: Tensor
    chosen_E: Tensor
    addable_E: Tensor


def _rank(chosen_ET: Tensor, score_ET: Tensor) -> _Ranking:
    """Sort on the pair (chosen first, score): one stable sort by score, then a stable partition."""
    T = score_ET.shape[1]
    score_ET, token_ET = score_ET.sort(dim=1, descending=True, stable=True)
    chosen_ET = chosen_ET.gather(1, token_ET)
    addable_ET = ~chosen_ET & ~score_ET.isneginf()
    chosen_E = chosen_ET.sum(dim=1)
    among_chosen_ET = chosen_ET.cumsum(1, dtype=torch.int32)
    after_chosen_ET = addable_ET.cumsum(1, dtype=torch.int32) + chosen_E.unsqueeze(1).int()
    place_ET = after_chosen_ET.masked_fill(~addable_ET, T + 1)
    return _Ranking(
        token_ET=token_ET,
        score_ET=score_ET,
        chosen_ET=chosen_ET,
        place_ET=torch.where(chosen_ET, among_chosen_ET, place_ET),
        chosen_E=chosen_E,
        addable_E=addable_ET.sum(dim=1),
    )


def _round_counts(
    ranking: _Ranking, *, rounding: Rounding, tile: int, uniform_E: Tensor | None
) -> Tensor:
    """(E,) int64: how many rows each expert gets."""
    over_E = ranking.chosen_E % tile
    down_E = ranking.chosen_E - over_E
    can_go_up_E = (over_E > 0) & (tile - over_E <= ranking.addable_E)

    match rounding:
        case "nearest":
            go_up_E = 2 * over_E > tile
        case "stochastic":
            assert uniform_E is not None
            go_up_E = uniform_E * tile < over_E
        case "score_stochastic":
            assert uniform_E is not None
            go_up_E = _score_draw(ranking, down_E, tile, uniform_E)
        case "balance":
            go_up_E = _balance(ranking.chosen_E, can_go_up_E, tile)
        case "up":
            go_up_E = over_E > 0
        case "down":
            go_up_E = torch.zeros_like(can_go_up_E)
    return down_E + tile * (go_up_E & can_go_up_E)


def _score_draw(ranking: _Ranking, down_E: Tensor, tile: int, uniform_E: Tensor) -> Tensor:
    """(E,) bool, True with probability a / (a + b); see "score_stochastic"."""
    place_ET, down_E1 = ranking.place_ET, down_E.unsqueeze(1)
    dropped_ET = ranking.chosen_ET & (place_ET > down_E1)
    added_ET = ~ranking.chosen_ET & (place_ET <= down_E1 + tile)
    # float64 sums: the outcome must not hang on the order of summation.
    dropped_E, added_E = (
        torch.where(those_ET, ranking.score_ET, 0.0).sum(dim=1, dtype=torch.float64)
        for those_ET in (dropped_ET, added_ET)
    )
    return uniform_E * (dropped_E + added_E) < dropped_E


def _balance(chosen_E: Tensor, can_go_up_E: Tensor, tile: int) -> Tensor:
    """(E,) bool: Alg. 6 over the experts in order, its recurrence solved in closed form.

    Alg. 6 keeps z, the running sum of changes, in [-tile/2, tile/2) by one choice per expert. Rows
    so far are a multiple of the tile, so while no choice is impossible their number of tiles is the
    one integer q with tile * q - (chosen so far) in that interval: the nearest, halves down. An
    expert that cannot go up leaves a debt of tiles that the next ones able to go up pay:
    debt_e = max(0, debt_(e-1) + wanted_e - can_e), a queue whose closed form is a cumulative sum
    less its running minimum. All in integers, so exactly what the loop gives, without E steps.
    """
    tiles_E = torch.div(2 * chosen_E.cumsum(0) + tile - 1, 2 * tile, rounding_mode="floor")
    wanted_E = tiles_E.diff(prepend=tiles_E.new_zeros(1)) - chosen_E // tile
    walk_E = (wanted_E - can_go_up_E.long()).cumsum(0)
    debt_E = walk_E - walk_E.cummin(0).values.clamp(max=0)
    return debt_E.diff(prepend=debt_E.new_zeros(1)) < wanted_E


def _keep_first(ranking: _Ranking, rows_E: Tensor) -> Tensor:
    """(E, T) bool in token order: the pair is among the first ``rows_E`` of its expert."""
    keep_ET = ranking.place_ET <= rows_E.unsqueeze(1)
    return torch.zeros_like(keep_ET).scatter(1, ranking.token_ET, keep_ET)


def _check_variant(num_tokens: int, rounding: str | None, tile: int | None) -> tuple[str, int]:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; accepted: {', '.join(ROUNDINGS)}")
    if tile is None or tile < 1:
        raise ValueError(f"rounding tile is {tile}; it must be at least 1")
    if tile > num_tokens:
        raise ValueError(
            f"rounding tile is {tile}, more than the {num_tokens} tokens of a microbatch, so no "
            "expert could fill it; choose a smaller tile or a larger microbatch"
        )
    return rounding, tile


def _check_rounding(
    ids_TK: Tensor,
    scores_TK: Tensor,
    scores_TE: Tensor,
    rounding: str,
    tile: int,
    uniform_E: Tensor | None,
) -> tuple[int, int]:
    if ids_TK.ndim != 2 or scores_TK.shape != ids_TK.shape:
        raise ValueError(
            f"ids_TK {tuple(ids_TK.shape)} and scores_TK {tuple(scores_TK.shape)} must both be "
            "(T, K)"
        )
    if scores_TE.ndim != 2 or scores_TE.shape[0] != ids_TK.shape[0]:
        raise ValueError(
            f"scores_TE is {tuple(scores_TE.shape)}; it must be (T, E) with T = {ids_TK.shape[0]}"
        )
    T, E = scores_TE.shape
    if not 1 <= ids_TK.shape[1] <= E:
        raise ValueError(f"ids_TK has K = {ids_TK.shape[1]} columns; K must lie in [1, E = {E}]")
    if T * E >= 2**31:
        raise ValueError(f"T * E is {T} * {E}; pairs are numbered in int32, keep it below 2**31")
    if uniform_E is not None and uniform_E.shape != (E,):
        raise ValueError(f"uniform_E is {tuple(uniform_E.shape)}; it must be (E,) = ({E},)")
    _check_variant(T, rounding, tile)
    return T, E
