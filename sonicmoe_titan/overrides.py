"""SonicMoE in TorchTitan's own models, from the command line.

    --override.imports 'sonicmoe_titan.overrides.sonic_moe={"router": "token_rounding"}' \\
        sonicmoe_titan.overrides.sonic_selective_ac

`sonic_moe` replaces every MoE block of a model whose experts are TorchTitan's `GroupedExperts`
(qwen3, deepseek_v3, ...); parameters, checkpoints and sharding stay what they were.
`sonic_selective_ac` belongs with it where selective activation checkpointing is on (TorchTitan's
default): without it the backward pass computes the experts a second time.
"""

from typing import Any

from torchtitan.config import derive, override
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.moe import MoE

from sonicmoe_titan.conversion import to_sonic
from sonicmoe_titan.moe import SonicMoE
from sonicmoe_titan.selective_ac import SonicSelectiveAC


@override(target=MoE.Config, description="SonicMoE: fused experts, minimal activations")
def sonic_moe(cfg: MoE.Config, **options: Any) -> SonicMoE.Config:
    """Replace one MoE block; `options` are `to_sonic`'s.

    Raises:
        ValueError: the block's experts, router or dispatcher are not ones it can stand in for.
        TypeError: an unknown option.
    """
    return to_sonic(cfg, **options)


@override(
    target=SelectiveAC.Config, exact=True, description="Selective checkpointing keeps the experts"
)
def sonic_selective_ac(cfg: SelectiveAC.Config) -> SonicSelectiveAC.Config:
    """Keep the experts' results, and no collective twice."""
    return derive(cfg, SonicSelectiveAC.Config)
