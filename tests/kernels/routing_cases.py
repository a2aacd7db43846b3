"""What the routing tests share: the slow, obvious versions and a recorder of dispatched ops.

Legend: T tokens, E experts, K experts per token, R routed rows.
"""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from sonicmoe_kernels.routing import RoutingPlan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Rows = list[list[tuple[int, float]]]  # per expert: (token, score)

# What makes the host wait for the device: reading a value, or a shape that depends on values.
SYNCHRONISING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "unique",
    "bincount",
    "equal",
    "repeat_interleave.Tensor",
)


class OpRecorder(TorchDispatchMode):
    """Collects what would synchronise: the ops above, and indexing by a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.synchronising: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        self.count += 1
        masks = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if masks or name.startswith(SYNCHRONISING):
            self.synchronising.append(name)
        return func(*args, **(kwargs or {}))


def rows_of(plan: RoutingPlan) -> Rows:
    """The plan's rows per expert, read on the host."""
    offsets = plan.expert_offsets.tolist()
    tokens, scores = plan.token_idx_R.tolist(), plan.score_R.tolist()
    return [
        list(zip(tokens[start:end], scores[start:end], strict=True))
        for start, end in pairwise(offsets)
    ]


def check_structure(plan: RoutingPlan) -> None:
    """Everything RoutingPlan promises of its five tensors."""
    T, E, R = plan.num_tokens, plan.num_experts, int(plan.expert_offsets[-1])
    for tensor in (plan.token_idx_R, plan.expert_offsets, plan.token_offsets, plan.token_rows_R):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert plan.score_R.dtype in (torch.float32, torch.float64)
    assert plan.token_idx_R.shape == plan.score_R.shape == plan.token_rows_R.shape == (plan.r_max,)
    assert plan.expert_offsets.shape == (E + 1,) and plan.token_offsets.shape == (T + 1,)
    assert plan.r_max >= R
    assert plan.expert_offsets[0] == 0 and bool((plan.expert_offsets.diff() >= 0).all())

    rows = rows_of(plan)
    for expert, expert_rows in enumerate(rows):
        tokens = [token for token, _ in expert_rows]
        assert tokens == sorted(tokens), f"expert {expert}: tokens {tokens} do not ascend"
    expert_of_row = [expert for expert, expert_rows in enumerate(rows) for _ in expert_rows]
    token_of_row = [token for expert_rows in rows for token, _ in expert_rows]
    assert all(0 <= token < T for token in token_of_row)

    assert plan.token_offsets[0] == 0 and plan.token_offsets[-1] == R
    offsets, slots = plan.token_offsets.tolist(), plan.token_rows_R.tolist()
    assert sorted(slots[:R]) == list(range(R))
    for token in range(T):
        mine = slots[offsets[token] : offsets[token + 1]]
        assert [token_of_row[row] for row in mine] == [token] * len(mine)
        experts = [expert_of_row[row] for row in mine]
        assert experts == sorted(experts), f"token {token}: experts {experts} do not ascend"
        if plan.rows_per_token is not None:
            assert len(mine) == plan.rows_per_token


def topk_rows(ids_TK: Tensor, scores_TK: Tensor, num_experts: int) -> Rows:
    """Token choice without rounding."""
    rows: Rows = [[] for _ in range(num_experts)]
    for token, (ids, scores) in enumerate(zip(ids_TK.tolist(), scores_TK.tolist(), strict=True)):
        for expert, score in zip(ids, scores, strict=True):
            rows[expert].append((token, score))
    return rows


def rounded_rows_by_loop(
    ids_TK: Tensor,
    scores_TK: Tensor,
    scores_TE: Tensor,
    *,
    rounding: str,
    tile: int,
    uniform_E: Tensor,
) -> Rows:
    """Token rounding as one would explain it: expert after expert, with exact fractions."""
    T, E = scores_TE.shape
    raw = scores_TE.tolist()
    uniform = [Fraction(u) for u in uniform_E.tolist()]
    balance = 0  # z of Alg. 6
    result: Rows = []
    for expert, chosen in enumerate(topk_rows(ids_TK, scores_TK, E)):
        carried = dict(chosen)
        others = [t for t in range(T) if t not in carried and raw[t][expert] != float("-inf")]

        def by_score(token: int, expert: int = expert) -> tuple[float, int]:
            return (-raw[token][expert], token)

        order = sorted(carried, key=by_score) + sorted(others, key=by_score)
        f = len(chosen)
        down, up = f // tile * tile, -(-f // tile) * tile
        dropped = sum(Fraction(raw[t][expert]) for t in order[down:f])
        added = sum(Fraction(raw[t][expert]) for t in order[f:up])
        total = dropped + added
        go_up = {
            "nearest": up - f < f - down,
            "stochastic": uniform[expert] < Fraction(f - down, tile),
            "score_stochastic": total != 0 and uniform[expert] < dropped / total,
            "balance": abs(up - f + balance) < abs(down - f + balance),
            "up": True,
            "down": False,
        }[rounding]
        count = up if go_up and up <= len(order) else down
        balance += count - f
        result.append([(t, carried.get(t, raw[t][expert])) for t in sorted(order[:count])])
    return result
