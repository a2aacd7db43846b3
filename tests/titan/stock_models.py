"""TorchTitan's own models under its own trainer, with and without the override."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import OverrideConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
from torchtitan.models.qwen3.config_registry import qwen3_moe_debug
from torchtitan.trainer import Trainer

from sonicmoe_titan.moe import SonicMoE
from tests.titan.distributed import NoTokenizer, RandomTokens, set_weights, without_bfloat16

STEPS = 2
LAYERS = {"qwen3": 1, "deepseek_v3": 2}  # up to the first with experts
RECIPES: dict[str, Callable[[], Trainer.Config]] = {
    "qwen3": qwen3_moe_debug,  # softmax scores, renormalised
    "deepseek_v3": deepseek_v3_debugmodel,  # sigmoid scores, shared experts, aux-free bias
}
MOE = {"backend": "torch"}
OVERRIDES = {
    "stock": (),
    "topk": (("sonicmoe_titan.overrides.sonic_moe", MOE),),
    "token rounding": (
        (
            "sonicmoe_titan.overrides.sonic_moe",
            MOE | {"router": "token_rounding", "rounding_tile": 4},
        ),
        "sonicmoe_titan.overrides.sonic_selective_ac",
    ),
}


class StockTrainer(Trainer):
    """TorchTitan's trainer inside a process group that outlives it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def init_distributed(self) -> ParallelDims:
        return ParallelDims.from_config(self.config.parallelism, dist.get_world_size())


def losses(model: str, override: str) -> list[float]:
    """The losses of the first steps of a debug model, cut after its first experts, in float32."""
    given = RECIPES[model]()
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    config = StockTrainer.Config(**{k: v for k, v in fields.items() if not k.startswith("_")})
    layers = config.model_spec.model.layers[: LAYERS[model]]
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # flex needs a GPU
    config.model_spec.model.layers = layers
    config.loss, config.tokenizer = CrossEntropyLoss.Config(), NoTokenizer.Config()
    config.loss.global_vocab_size = config.model_spec.model.vocab_size
    config.dataloader = RandomTokens.Config()
    training = {"local_batch_size": 1, "seq_len": 64, "steps": STEPS, "disable_cuda_graphs": True}
    config.training = dataclasses.replace(
        config.training, mixed_precision_param="float32", **training
    )
    config.metrics = dataclasses.replace(config.metrics, log_freq=1)
    config.override = OverrideConfig(imports=list(OVERRIDES[override]))
    experts_forward = GroupedExperts.forward
    GroupedExperts.forward = without_bfloat16(experts_forward)
    _clear_sharding_prop_cache()
    try:
        return _train(config, sonic=override != "stock")
    finally:
        GroupedExperts.forward = experts_forward


def _train(config: StockTrainer.Config, *, sonic: bool) -> list[float]:
    trainer: Any = config.build()
    (model,) = trainer.model_parts
    set_weights(model)
    # a dense layer has none
    blocks = [layer.moe for layer in model.layers.values() if getattr(layer, "moe", None)]
    assert blocks and all(isinstance(block, SonicMoE) == sonic for block in blocks)
    iterator, seen = trainer.batch_generator(trainer.dataloader), []
    forward_backward = trainer.forward_backward_step

    def noted(**kwargs: Any) -> torch.Tensor:
        loss = forward_backward(**kwargs)
        seen.append(float(loss.detach()))
        return loss

    trainer.forward_backward_step = noted
    for trainer.step in range(1, STEPS + 1):
        trainer.train_step(iterator)
    return seen


FUNCTIONS = {
    f"{model}, {override}": partial(losses, model, override)
    for model, override in (
        ("qwen3", "stock"),
        ("qwen3", "topk"),
        ("deepseek_v3", "stock"),
        ("deepseek_v3", "topk"),
        ("deepseek_v3", "token rounding"),
    )
}
