"""The injected auxiliary losses against the explicit ones, on the ranks of a launch."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor

from sonicmoe_titan.aux_loss import attach_loss, load_balancing_loss, z_loss

T, E, K, MICROBATCHES = 12, 6, 2, 3


def _logits() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    return list(torch.randn(MICROBATCHES, T, E, generator=generator, dtype=torch.float64))


def injected_equals_explicit() -> dict[str, float]:
    """Greatest deviation of the logits' gradients over all microbatches.

    Explicit: per microbatch, gather the tokens of all ranks, Switch's loss by its formula with
    f from one-hot choices, plus the z-loss; mean over microbatches. Injected: what the router does.
    """
    W = dist.get_world_size()
    weight = torch.randn(T, K, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor(1 / (W * MICROBATCHES), dtype=torch.float64)

    explicit = []
    for logits in _logits():
        logits.requires_grad_()
        everyone = torch.cat(dist_nn.all_gather(logits))
        probability = everyone.softmax(dim=1)
        chosen = torch.zeros_like(probability).scatter(1, probability.topk(K, dim=1).indices, 1.0)
        fraction = (chosen / K).mean(dim=0)
        loss = 0.3 * E * (fraction * probability.mean(dim=0)).sum()
        loss = loss + 0.7 * everyone.exp().sum(dim=1).log().square().mean()
        loss = loss / MICROBATCHES
        main = (logits.softmax(dim=1).topk(K, dim=1).values * weight).sum()
        # all_gather's backward sums over ranks what every rank computed alike
        (gradient,) = torch.autograd.grad(main + loss / W, logits)
        explicit.append(gradient)

    injected = []
    for logits in _logits():
        logits.requires_grad_()
        probability = logits.softmax(dim=1)
        scores, ids = probability.topk(K, dim=1)
        count = torch.zeros(E, dtype=torch.float64).scatter_add(
            0, ids.flatten(), torch.ones(T * K, dtype=torch.float64)
        )
        loss = 0.3 * load_balancing_loss(probability, count, top_k=K, groups=[dist.group.WORLD])
        loss = loss + 0.7 * z_loss(logits)
        scores = attach_loss(scores, loss, scale)
        (gradient,) = torch.autograd.grad((scores * weight).sum(), logits)
        injected.append(gradient)

    deviations = [(a - b).abs().max() for a, b in zip(injected, explicit, strict=True)]
    return {
        "deviation": torch.stack(deviations).max().item(),
        "gradient": torch.stack(explicit).abs().max().item(),
    }


FUNCTIONS: dict[str, Callable[[], dict[str, float]]] = {
    "injected_equals_explicit": injected_equals_explicit
}
