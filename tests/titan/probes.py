"""What runs look at after their last step; importable, because the ranks are other processes."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sonicmoe_titan.stats import collect
from tests.titan.distributed import set_weights


def layer_stats(trainer: Any) -> list[dict[str, Any]]:
    """Per MoE layer of this rank: the statistics by name, the load, and TorchTitan's own count."""
    blocks = [block for part in trainer.model_parts for block in part.layers.values()]
    chosen = [block.moe.tokens_per_expert_E for block in blocks]
    return [
        dict(zip(stats.NAMES, stats.values_V.tolist(), strict=True))
        | {"load": stats.load_E.tolist(), "chosen": chosen[layer].tolist(), "layer": layer}
        for layer, stats in collect(trainer.model_parts)
    ]


def evaluation(trainer: Any) -> dict[str, float]:
    """Mean cross-entropy of fixed tokens in evaluation mode, from the weights of the start."""
    (model,) = trainer.model_parts
    set_weights(model)
    model.eval()
    tokens = torch.arange(128).view(2, 64) % 61
    with torch.no_grad(), trainer.train_context():
        logits = model(tokens).float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    return {"same weights": loss.item()}


def expert_bias(trainer: Any) -> list[list[float]]:
    """TorchTitan's aux-free bias of every layer after its last update."""
    (model,) = trainer.model_parts
    return [_whole(block.moe.expert_bias_E).tolist() for block in model.layers.values()]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
