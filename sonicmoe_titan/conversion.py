"""From a stock MoE block's configuration to SonicMoE's, or a clear refusal."""

from typing import Literal, get_args

from torchtitan.config import derive
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import (
    GroupedExperts,
    MoE,
    RoutedExperts,
    TokenChoiceTopKRouter,
)
from torchtitan.models.common.token_dispatcher import (
    AllToAllTokenDispatcher,
    LocalTokenDispatcher,
)

from sonicmoe_titan.model_args import Backend, FusedBlock, Rounding, Router
from sonicmoe_titan.moe import (
    FIXED_TOP_K_DISPATCHERS,
    SonicGroupedExperts,
    SonicMoE,
    SonicRoutedExperts,
)
from sonicmoe_titan.router import Float32Gate, SonicRouter
from sonicmoe_titan.stats import KERNEL_TILE_ROWS


def to_sonic(
    moe_cfg: MoE.Config,
    *,
    router: Router = "topk",
    rounding: Rounding = "nearest",
    rounding_tile: int = KERNEL_TILE_ROWS,
    softmax_order: Literal["before", "after"] = "before",
    aux_loss_coeff: float = 0.0,
    z_loss_coeff: float = 0.0,
    backend: Backend = "auto",
    redispatch_x: bool = False,
    fused_block: FusedBlock = "auto",
) -> SonicMoE.Config:
    """The SonicMoE block that computes what a stock MoE block does, with the same parameters.

    Args:
        moe_cfg: a stock `MoE.Config`, with or without sharding configs; not changed.
        router: "topk" (token choice) or "token_rounding" (in training).
        rounding, rounding_tile: how token rounding rounds, and to which multiple of rows.
        softmax_order: softmax over all experts "before" the top-k or over the winners "after".
        aux_loss_coeff, z_loss_coeff: load-balancing loss and router z-loss; 0 is off.
        backend: "auto", "hopper" or "torch".
        redispatch_x: under expert parallelism send x again in backward instead of saving it.
        fused_block: when an eager block is one operator, where `fused` can: "auto" (few tokens),
            "always" or "never".

    Raises:
        ValueError: an option that is not accepted; a part of the block is a class whose behaviour
            this block does not reproduce; a dispatcher that cannot carry token rounding.
    """
    _check_options(
        router=router,
        rounding=rounding,
        softmax_order=softmax_order,
        backend=backend,
        fused_block=fused_block,
    )
    if rounding_tile < 1:
        raise ValueError(f"rounding_tile is {rounding_tile}; it must be at least 1")
    _refuse_foreign(moe_cfg)
    _check_dispatcher(moe_cfg.routed_experts.token_dispatcher, router)
    experts = moe_cfg.routed_experts
    return derive(
        moe_cfg,
        SonicMoE.Config,
        fused_block=fused_block,
        router=derive(
            moe_cfg.router,
            SonicRouter.Config,
            gate=derive(moe_cfg.router.gate, Float32Gate.Config),
            softmax_order=softmax_order,
            aux_loss_coeff=aux_loss_coeff,
            z_loss_coeff=z_loss_coeff,
            backend=backend,
            all_scores=router == "token_rounding",
        ),
        routed_experts=derive(
            experts,
            SonicRoutedExperts.Config,
            inner_experts=derive(experts.inner_experts, SonicGroupedExperts.Config),
            router=router,
            rounding=rounding,
            rounding_tile=rounding_tile,
            backend=backend,
            redispatch_x=redispatch_x,
        ),
    )


def _check_options(**given: str) -> None:
    for name, value in given.items():
        if value not in _ACCEPTED[name]:
            accepted = ", ".join(_ACCEPTED[name])
            raise ValueError(f"{name} is {value!r}; accepted: {accepted}")


_ACCEPTED: dict[str, tuple[str, ...]] = {
    "router": get_args(Router),
    "rounding": get_args(Rounding),
    "softmax_order": ("before", "after"),
    "backend": get_args(Backend),
    "fused_block": get_args(FusedBlock),
}


def _check_dispatcher(dispatcher: LocalTokenDispatcher.Config, router: Router) -> None:
    name = type(dispatcher).__qualname__
    if isinstance(dispatcher, tuple(cls.Config for cls in FIXED_TOP_K_DISPATCHERS)):
        if router == "token_rounding":
            raise ValueError(
                f"{name} carries exactly top_k experts per token, but token rounding gives a token "
                "more or fewer: use the standard (all-to-all) dispatcher or router = 'topk'"
            )
    elif type(dispatcher) not in (LocalTokenDispatcher.Config, AllToAllTokenDispatcher.Config):
        raise ValueError(
            f"the token dispatcher {name} pads or quantises what it sends; SonicMoE replaces the "
            "local and the all-to-all one and runs behind DeepEP, HybridEP and MinimalAsyncEP"
        )


def _refuse_foreign(moe_cfg: MoE.Config) -> None:
    experts = moe_cfg.routed_experts
    expected = {
        "moe": (moe_cfg, MoE.Config),
        "moe.router": (moe_cfg.router, TokenChoiceTopKRouter.Config),
        "moe.router.gate": (moe_cfg.router.gate, Linear.Config),
        "moe.routed_experts": (experts, RoutedExperts.Config),
        "moe.routed_experts.inner_experts": (experts.inner_experts, GroupedExperts.Config),
    }
    for name, (given, accepted) in expected.items():
        if type(given) is not accepted:
            raise ValueError(
                f"{name} is a {type(given).__qualname__}; SonicMoE replaces exactly "
                f"{accepted.__qualname__} (no quantised or biased variants): "
                "leave out the converter or keep the stock block for this model"
            )
