"""Stock MoE block configurations of three styles, and the same block with and without SonicMoE."""

from typing import Any

import torch
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.moe import GroupedExperts, MoE

from sonicmoe_titan.conversion import to_sonic
from sonicmoe_titan.moe import SonicMoE

B, L, D, F, E, K = 2, 24, 32, 16, 8, 3

_NORMAL = {"weight": torch.nn.init.normal_}

STYLES: dict[str, dict[str, Any]] = {
    "qwen3": {"score_func": "softmax", "route_norm": True},
    "unnormalised": {"score_func": "softmax", "route_norm": False, "route_scale": 2.5},
    "deepseek_v3": {
        "score_func": "sigmoid",
        "route_norm": True,
        "route_scale": 2.5,
        "num_expert_groups": 4,
        "num_limited_groups": 2,
    },
}


def stock_config(
    style: str,
    *,
    comm_backend: str = "standard",
    sizes: tuple[int, int, int, int] = (D, F, E, K),
    router: dict[str, Any] | None = None,
) -> MoE.Config:
    """A stock block; deepseek_v3's has shared experts, groups and the aux-free bias.

    sizes: D, F, E and K. router: its options, those of the style if None.
    """
    D, F, E, K = sizes
    deepseek = style == "deepseek_v3"
    shared = make_ffn_config(dim=D, hidden_dim=F, w1_param_init=_NORMAL, w2w3_param_init=_NORMAL)
    return make_moe_config(
        num_experts=E,
        load_balance_coeff=1e-3 if deepseek else None,
        shared_experts=shared if deepseek else None,
        router=make_router_config(
            dim=D, num_experts=E, gate_param_init=_NORMAL, top_k=K, **(router or STYLES[style])
        ),
        routed_experts=make_routed_experts_config(
            dim=D,
            hidden_dim=F,
            num_experts=E,
            top_k=K,
            param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), torch.nn.init.normal_),
            comm_backend=comm_backend,
        ),
    )


def build_pair(style: str, **options: Any) -> tuple[MoE, SonicMoE]:
    """The stock block and ours, in float32 with the same weights and the same aux-free bias."""
    config = stock_config(style)
    stock, ours = config.build(), to_sonic(config, backend="torch", **options).build()
    torch.manual_seed(0)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if stock.expert_bias_E is not None:
        stock.expert_bias_E.uniform_(-0.3, 0.3)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def batch() -> torch.Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))


def grouped_experts_in_float32(self: GroupedExperts, x: torch.Tensor, count: torch.Tensor) -> Any:
    """Stock's experts written as a loop: its own forward casts to bf16 whatever it is given."""
    rows = x.split(count.long().tolist())
    weights = zip(rows, self.w1_EFD, self.w3_EFD, self.w2_EDF, strict=True)
    silu = torch.nn.functional.silu
    return torch.cat([(silu(r @ w1.T) * (r @ w3.T)) @ w2.T for r, w1, w3, w2 in weights])
