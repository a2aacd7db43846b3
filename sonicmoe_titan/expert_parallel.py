"""Expert parallelism: a token travels once to every rank that owns one of its experts.

The sender turns its plan into unique (destination, token) rows and into (row, local expert, score)
pairs. The receiver builds a plan of its own from the pairs and runs the same fused experts as
without expert parallelism: their aggregation leaves one row per received token, which travels back
and is summed over the ranks. Gradients of x and of the scores take the same ways in reverse.

Rounding happened at the sender: each expert receives whole tiles from every rank.

Legend: T local tokens, D model width, E experts, e experts per rank, W ranks, R rows of the
sender's plan, P pairs received, U (destination, token) rows sent, V rows received.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from sonicmoe_kernels.routing import RoutingPlan
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Experts = Callable[[Tensor, RoutingPlan], Tensor]
"""The local experts: ((V, D) tokens, their plan) to (V, D)."""


def expert_parallel(
    x_TD: Tensor,
    plan: RoutingPlan,
    experts: Experts,
    *,
    group: dist.ProcessGroup,
    redispatch_x: bool = False,
) -> Tensor:
    """Run every token through its experts, which live on the ranks of `group`.

    Rank w owns the experts [w * e, (w + 1) * e). Waits once for the host to learn the split sizes.
    Kept for backward beside what `experts` keeps of its input: index tensors.

    Args:
        x_TD: (T, D) this rank's tokens.
        plan: their routing to all E experts.
        experts: what this rank computes for the tokens that it receives.
        group: the expert-parallel ranks; its size W divides E.
        redispatch_x: do not keep the received tokens for backward, send them again there.

    Returns:
        (T, D) in the dtype of x.

    Raises:
        ValueError: W does not divide E.
    """
    W = dist.get_world_size(group)
    if plan.num_experts % W:
        raise ValueError(
            f"{W} expert-parallel ranks cannot share {plan.num_experts} experts evenly; choose a "
            "parallelism.expert_parallel_degree that divides model.num_experts"
        )
    T, e = x_TD.shape[0], plan.num_experts // W
    rank_U, pair_R, send_W2 = _outgoing(plan, W)
    recv_W2 = _exchange(send_W2, None, None, group)
    send, recv = _on_host(send_W2, recv_W2)
    (tokens_out, rows_out), (tokens_in, rows_in) = send, recv

    send_token_U = _positions_of_true(rank_U, sum(tokens_out)) % T
    x_UD = _GatherTokens.apply(x_TD, send_token_U, tokens_out)
    x_VD = _send(x_UD, tokens_in, tokens_out, group)
    pair_P = _send(pair_R[: sum(rows_out)], rows_in, rows_out, group)
    score_P = _send(plan.score_R[: sum(rows_out)], rows_in, rows_out, group)
    token_P = funcol.wait_tensor(pair_P) // e + _block_start(recv_W2, sum(rows_in))
    plan_recv = RoutingPlan.from_pairs(
        token_P,
        funcol.wait_tensor(pair_P) % e,
        funcol.wait_tensor(score_P),
        num_tokens=sum(tokens_in),
        num_experts=e,
    )
    x_VD = funcol.wait_tensor(x_VD)
    if redispatch_x and x_VD.requires_grad:

        def send_again() -> Tensor:
            x_UD = x_TD.detach().index_select(0, send_token_U)
            return _exchange(x_UD, tokens_in, tokens_out, group)

        with _recomputed(x_VD, send_again):
            y_VD = experts(x_VD, plan_recv)
    else:
        y_VD = experts(x_VD, plan_recv)
    y_UD = funcol.wait_tensor(_send(y_VD, tokens_out, tokens_in, group))
    return _SumOverRanks.apply(y_UD, send_token_U, tokens_out, T)


def _outgoing(plan: RoutingPlan, W: int) -> tuple[Tensor, Tensor, Tensor]:
    """What this rank sends, as device tensors.

    Returns:
        (W * T,) running count of the (destination, token) rows; (R_max,) each pair as
        row within its destination's block * e + local expert; (W, 2) tokens and pairs per rank.
    """
    T, e = plan.num_tokens, plan.num_experts // W
    device = plan.token_idx_R.device
    row_R = torch.arange(plan.r_max, device=device, dtype=torch.int32)
    # rows beyond R fall to expert E, hence to the rank W that does not exist
    expert_R = torch.searchsorted(plan.expert_offsets[1:].contiguous(), row_R, right=True)
    destination_R = expert_R // e
    key_R = destination_R * T + plan.token_idx_R
    travels_WT = torch.zeros(W * T + 1, dtype=torch.bool, device=device).scatter(0, key_R, True)
    travels_WT = travels_WT[: W * T]
    rank_U = travels_WT.cumsum(0)
    tokens_W = travels_WT.view(W, T).sum(1)
    block_start_W1 = torch.cat([tokens_W.new_zeros(1), tokens_W.cumsum(0)])
    row_in_block_R = rank_U[key_R.clamp(max=W * T - 1)] - 1 - block_start_W1[destination_R]
    rows_W = plan.expert_offsets[::e].diff()
    return rank_U, row_in_block_R * e + expert_R % e, torch.stack([tokens_W, rows_W.long()], dim=1)


def _on_host(*counts_W2: Tensor) -> list[tuple[list[int], list[int]]]:
    """Per (W, 2) tensor its two columns as integers: the one wait for the device."""
    # one copy, which selective checkpointing keeps; .tolist() on the device tensor it would repeat
    flat = torch.stack(counts_W2).transpose(1, 2).to("cpu").flatten().tolist()
    W = counts_W2[0].shape[0]
    for size in flat:
        torch._check(size >= 0)
    columns = [flat[start : start + W] for start in range(0, len(flat), W)]
    return [(columns[i], columns[i + 1]) for i in range(0, len(columns), 2)]


def _positions_of_true(rank: Tensor, count: int) -> Tensor:
    """Where the flags whose running count is `rank` are set; `count` of them."""
    return torch.searchsorted(rank, torch.arange(1, count + 1, device=rank.device))


def _block_start(recv_W2: Tensor, num_pairs: int) -> Tensor:
    """(P,) where the block of received tokens starts that each received pair belongs to."""
    tokens_W, rows_W = recv_W2.unbind(1)
    pair_P = torch.arange(num_pairs, device=recv_W2.device)
    source_P = torch.searchsorted(rows_W.cumsum(0), pair_P, right=True)
    return (tokens_W.cumsum(0) - tokens_W)[source_P]


def _send(
    x: Tensor, splits_in: list[int], splits_out: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Differentiable all-to-all along the first dimension, to be waited for."""
    return funcol.all_to_all_single(x.contiguous(), splits_in, splits_out, group)


def _exchange(
    x: Tensor, splits_in: list[int] | None, splits_out: list[int] | None, group: dist.ProcessGroup
) -> Tensor:
    """All-to-all without gradient, waited for."""
    with torch.no_grad():
        return funcol.wait_tensor(funcol.all_to_all_single(x, splits_in, splits_out, group))


def _sum_blocks(y_UD: Tensor, token_U: Tensor, splits: list[int], num_tokens: int) -> Tensor:
    """(T, D): rows summed per token in float32, destination after destination: deterministic.

    Tokens are distinct within one destination's block, so no two additions of a step meet.
    """
    sum_TD = y_UD.new_zeros(num_tokens, y_UD.shape[1], dtype=_accumulator(y_UD.dtype))
    blocks = zip(token_U.split(splits), y_UD.split(splits), strict=True)
    for token_block, y_block in blocks:
        sum_TD.index_add_(0, token_block, y_block.to(sum_TD.dtype))
    return sum_TD.to(y_UD.dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _GatherTokens(torch.autograd.Function):
    """(T, D) to the (U, D) rows to send; backward sums each token's rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_U: Tensor, splits: list[int]) -> Tensor:
        ctx.save_for_backward(token_U)
        ctx.splits, ctx.num_tokens = splits, x_TD.shape[0]
        return x_TD.index_select(0, token_U)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, dx_UD: Tensor) -> tuple[Tensor, None, None]:
        (token_U,) = ctx.saved_tensors
        return _sum_blocks(dx_UD, token_U, ctx.splits, ctx.num_tokens), None, None


class _SumOverRanks(torch.autograd.Function):
    """The (U, D) rows that came back, summed to (T, D); backward hands each row its token's."""

    @staticmethod
    def forward(
        ctx: Any, y_UD: Tensor, token_U: Tensor, splits: list[int], num_tokens: int
    ) -> Tensor:
        ctx.save_for_backward(token_U)
        return _sum_blocks(y_UD, token_U, splits, num_tokens)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (token_U,) = ctx.saved_tensors
        return dout_TD.index_select(0, token_U), None, None, None


def _recomputed(x_VD: Tensor, recompute: Callable[[], Tensor]) -> saved_tensors_hooks:
    """Within this context autograd keeps `recompute` wherever it would keep `x_VD`."""

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        same = saved.data_ptr() == x_VD.data_ptr() and saved.shape == x_VD.shape
        return recompute if same else saved

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    return saved_tensors_hooks(pack, unpack)
