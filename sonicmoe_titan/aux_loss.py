"""Auxiliary router losses, exact and without a value that travels to the trainer.

A loss computed inside a block joins the backward pass by gradient injection: `attach_loss` returns
its first argument unchanged and hands the loss its gradient, the loss scale, when the backward pass
comes by. It works under pipeline parallelism and chunked losses, and a block that activation
checkpointing computes twice injects once.

Legend: T tokens of one forward pass on one rank, E experts, K experts per token.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn


def load_balancing_loss(
    probability_TE: Tensor, count_E: Tensor, *, top_k: int, groups: Sequence[dist.ProcessGroup] = ()
) -> Tensor:
    """E * sum_e f_e p_e (Switch Transformer, arXiv 2101.03961, eq. 4-6, for K experts per token).

    f_e is the fraction of all T * K choices that fell on expert e, over the ranks of all `groups`;
    p_e is this rank's mean probability of e. f carries no gradient, so the mean of this loss over
    the ranks, and its gradient, are those of the loss of all their tokens together.

    Args:
        probability_TE: (T, E) router probabilities, each row summing to 1.
        count_E: (E,) tokens of this rank that chose each expert, before rounding.
        top_k: K.
        groups: process groups whose product holds the ranks to average f over, T alike on all.

    Returns:
        A scalar, 1 for a perfectly balanced router.
    """
    T, E = probability_TE.shape
    count_E = count_E.to(probability_TE.dtype)
    num_ranks = 1
    for group in groups:
        count_E = funcol.wait_tensor(funcol.all_reduce(count_E, "sum", group))
        num_ranks *= dist.get_world_size(group)
    f_E = count_E / (T * top_k * num_ranks)
    # not mean(): its backward writes (T, E), that of sum() is one row seen as (T, E)
    return E * torch.dot(f_E, probability_TE.sum(dim=0) / T)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, a scalar (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def attach_loss(anchor: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """`anchor` unchanged; the backward pass through it also differentiates `scale * loss`.

    Args:
        anchor: any tensor whose gradient the backward pass computes.
        loss: scalar.
        scale: scalar on the device, read during backward.
    """
    return _AttachLoss.apply(anchor, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype
        return anchor.view_as(anchor)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, danchor: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return danchor, scale.to(ctx.loss_dtype), None


def set_loss_scale(model_parts: Sequence[nn.Module], scale: float) -> None:
    """Say what one forward pass weighs in the step's mean of the auxiliary losses.

    TorchTitan divides its loss by the global number of tokens and sums gradients over ranks, so
    `scale` is 1 / (data-parallel ranks, context-parallel ones included, * gradient accumulation
    steps * pipeline microbatches). Written in place: a captured CUDA graph reads the new value.
    """
    for part in model_parts:
        for module in part.modules():
            if hasattr(module, "set_loss_scale"):
                module.set_loss_scale(scale)  # pyrefly: ignore[not-callable]
