"""The MoE block: TorchTitan's, with the experts of one layer as a single fused region.

Legend: B batch, L sequence, D model width, F expert width, E experts, e local experts, K experts
per token, T = B * L tokens.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan, token_rounding_plan
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import (
    GroupedExperts,
    MoE,
    RoutedExperts,
)
from torchtitan.models.common.token_dispatcher import (
    DeepEPTokenDispatcher,
    HybridEPTokenDispatcher,
    MinimalAsyncEPTokenDispatcher,
)
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig

from sonicmoe_titan.expert_parallel import Experts, expert_parallel
from sonicmoe_titan.fused import routed_output
from sonicmoe_titan.model_args import Backend, FusedBlock, Rounding, Router
from sonicmoe_titan.router import Float32Gate, SonicRouter
from sonicmoe_titan.stats import RouterStats, first_pass

FIXED_TOP_K_DISPATCHERS = (
    DeepEPTokenDispatcher,
    HybridEPTokenDispatcher,
    MinimalAsyncEPTokenDispatcher,
)
"""TorchTitan's own transports that carry exactly K experts per token."""


class SonicGroupedExperts(GroupedExperts):
    """The experts' three weights under stock's names; `SonicRoutedExperts` computes with them."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def local_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's w1 (e, F, D), w3 (e, F, D) and w2 (e, D, F) in `dtype`."""
        w1, w3, w2 = self.w1_EFD, self.w3_EFD, self.w2_EDF
        return _local(w1, dtype), _local(w3, dtype), _local(w2, dtype)


def _local(weight: Tensor, dtype: torch.dtype) -> Tensor:
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    return weight if weight.dtype == dtype else weight.to(dtype)


class SonicRoutedExperts(RoutedExperts):
    """Plan, experts and combination of one MoE layer, on plain local tensors."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        router: Router = "topk"
        rounding: Rounding = "nearest"
        rounding_tile: int = 128
        backend: Backend = "auto"
        redispatch_x: bool = False

    inner_experts: SonicGroupedExperts
    stats: RouterStats

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.ep_group: dist.ProcessGroup | None = None
        self._has_fixed_top_k = isinstance(self.token_dispatcher, FIXED_TOP_K_DISPATCHERS)

    def forward(  # pyrefly: ignore [bad-override]
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor | None,
        scores_BLE: Tensor,
    ) -> Tensor:
        """Sum of each token's expert outputs times their scores.

        Args:
            x_BLD: (B, L, D).
            topk_scores_BLK: (B, L, K) float32.
            topk_expert_ids_BLK: (B, L, K) int64.
            num_local_tokens_per_expert_E: (E,) tokens per expert before rounding; may be None where
                not `reads_counts`.
            scores_BLE: (B, L, E) float32, what an added (token, expert) entry would score.

        Returns:
            (B, L, D) in the dtype of x.
        """
        x_TD, count_E = x_BLD.flatten(0, 1), num_local_tokens_per_expert_E
        ids_TK, scores_TK = topk_expert_ids_BLK.flatten(0, 1), topk_scores_BLK.flatten(0, 1)
        counting = self.training and first_pass()
        w1, w3, w2 = self.inner_experts.local_weights(x_TD.dtype)

        def experts(x_TD: Tensor, plan: RoutingPlan, rows_E: Tensor | None = None) -> Tensor:
            if counting:
                self.stats.add_tiles(plan.expert_offsets.diff() if rows_E is None else rows_E)
            return moe_experts(x_TD, w1, w3, w2, plan, backend=self.config.backend)

        if self._has_fixed_top_k and count_E is not None:
            if counting:
                self.stats.add_rows(count_E)
            out_TD = self._through_dispatcher(x_TD, scores_TK, ids_TK, count_E, experts)
            return out_TD.view_as(x_BLD)

        plan, rows_E = self._plan(ids_TK, scores_TK, scores_BLE.flatten(0, 1)), None
        if counting:
            rows_E = plan.expert_offsets.diff()
            self.stats.add_rows(rows_E, count_E)
        if self.ep_group is None:
            out_TD = experts(x_TD, plan, rows_E)
        else:
            out_TD = expert_parallel(
                x_TD, plan, experts, group=self.ep_group, redispatch_x=self.config.redispatch_x
            )
        return out_TD.view_as(x_BLD)

    @property
    def reads_counts(self) -> bool:
        """Whether `forward` needs the tokens per expert before rounding."""
        rounding = self.config.router != "topk" and self.training
        return rounding or self._has_fixed_top_k

    def _plan(self, ids_TK: Tensor, scores_TK: Tensor, scores_TE: Tensor) -> RoutingPlan:
        if self.config.router == "topk" or not self.training:
            num_experts = scores_TE.shape[1]
            return RoutingPlan.from_topk(
                ids_TK, scores_TK, num_experts=num_experts, backend=self.config.backend
            )
        return token_rounding_plan(
            ids_TK,
            scores_TK,
            scores_TE,
            rounding=self.config.rounding,
            tile=self.config.rounding_tile,
            backend=self.config.backend,
        )

    def _through_dispatcher(
        self, x_TD: Tensor, scores_TK: Tensor, ids_TK: Tensor, count_E: Tensor, experts: Experts
    ) -> Tensor:
        """Let TorchTitan's dispatcher move, weigh and combine; it hands over expert-major rows."""
        x_RD, count_e, metadata = self.token_dispatcher.dispatch(x_TD, scores_TK, ids_TK, count_E)
        plan = _plan_of_rows(count_e, x_RD.shape[0])
        return self.token_dispatcher.combine(experts(x_RD, plan), metadata, x_TD)

    def parallelize(self, parallel_dims: Any) -> None:
        """Shard as stock does; the additional input `scores_BLE` lies like the top-k's scores."""
        if self._sharding_config is not None:
            self._sharding_config = _with_scores_input(self._sharding_config)
        super().parallelize(parallel_dims)
        ep_mesh = parallel_dims.get_optional_mesh("ep")
        self.ep_group = None if ep_mesh is None else ep_mesh.get_group()


def _offsets(count_E: Tensor) -> Tensor:
    """(E + 1,) int32, where each expert's rows start."""
    return F.pad(count_E.cumsum(0, dtype=torch.int32), (1, 0))


def _plan_of_rows(count_e: Tensor, num_rows: int) -> RoutingPlan:
    """Every row is a token of its own, of score 1; the first count_0 go to expert 0 and so on."""
    offsets = _offsets(count_e)
    row_R1 = torch.arange(num_rows + 1, device=count_e.device, dtype=torch.int32)
    return RoutingPlan(
        token_idx_R=row_R1[:-1],
        score_R=torch.ones(num_rows, device=count_e.device),
        expert_offsets=offsets,
        token_offsets=torch.minimum(row_R1, offsets[-1]),  # rows that nobody filled own nothing
        token_rows_R=row_R1[:-1],
        rows_per_token=None,
        num_tokens=num_rows,
    )


def _with_scores_input(config: ShardingConfig) -> ShardingConfig:
    def extended(layouts: dict[str, Any] | None) -> dict[str, Any] | None:
        if layouts is None or "topk_scores_BLK" not in layouts:
            return layouts
        return {**layouts, "scores_BLE": layouts["topk_scores_BLK"]}

    local_map = config.local_map
    if local_map is not None and local_map.in_grad_placements is not None:
        grads = local_map.in_grad_placements
        local_map = LocalMapConfig(in_grad_placements=(*grads, grads[1]))
    return dataclasses.replace(
        config,
        in_src_shardings=extended(config.in_src_shardings),
        in_dst_shardings=extended(config.in_dst_shardings),
        local_map=local_map,
    )


FUSED_KINDS = (SonicRouter, Float32Gate, SonicRoutedExperts, SonicGroupedExperts)
"""The modules for which one operator may stand in, see `fused`."""


class SonicMoE(MoE):
    """TorchTitan's MoE block (same parameter names) around `SonicRoutedExperts`."""

    @dataclass(kw_only=True, slots=True)
    class Config(MoE.Config):
        fused_block: FusedBlock = "auto"

    router: SonicRouter
    routed_experts: SonicRoutedExperts

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.fused_block: FusedBlock = config.fused_block
        self.stats = RouterStats(config.num_experts)
        self.router.stats = self.stats
        self.routed_experts.stats = self.stats

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D): routed experts plus the shared experts if there are any."""
        out_BLD = routed_output(self, x_BLD, kinds=FUSED_KINDS)
        if out_BLD is None:
            scores_BLK, ids_BLK, scores_BLE = self.router(x_BLD, self.expert_bias_E)
            count_E = self._count(ids_BLK, scores_BLE)
            out_BLD = self.routed_experts(x_BLD, scores_BLK, ids_BLK, count_E, scores_BLE)
        if self.shared_experts is None:
            return out_BLD
        return out_BLD + self.shared_experts(x_BLD)

    def _count(self, ids_BLK: Tensor, scores_BLE: Tensor) -> Tensor | None:
        """Tokens per expert before rounding (the aux-free bias balances what the router prefers).

        Adds to the running count in training. Returns (E,), or None where nobody reads it.
        """
        if isinstance(ids_BLK, DTensor):
            chosen_BLE = torch.zeros_like(scores_BLE, dtype=torch.bool).scatter_(-1, ids_BLK, True)
            count_E = chosen_BLE.sum(dim=(0, 1))
            if self.training:
                self.tokens_per_expert_E.add_(count_E)
            return count_E
        ids_P = ids_BLK.flatten()
        if self.routed_experts.reads_counts:
            count_E = self.stats.count_choices(ids_P)
            if self.training:
                self.tokens_per_expert_E.add_(count_E)
            return count_E
        if self.training:
            self.stats.count_choices(ids_P, into_E=self.tokens_per_expert_E)
        return None

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        super()._init_self_buffers(buffer_device=buffer_device)
        self.stats.allocate(buffer_device or self.tokens_per_expert_E.device)
