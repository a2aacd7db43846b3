"""The router: a float32 gate and token choice, under every SPMD backend.

Legend: B batch, L sequence, D model width, E experts, K experts per token, T = B * L tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from sonicmoe_kernels.router_sums import ENTROPY_SAMPLE
from sonicmoe_kernels.routing import RENORMALIZE_EPS, TopK, route_topk
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from sonicmoe_titan.aux_loss import attach_loss, load_balancing_loss, z_loss
from sonicmoe_titan.float32_product import float32_product
from sonicmoe_titan.model_args import Backend
from sonicmoe_titan.stats import RouterStats, first_pass


class Float32Gate(Linear):
    """A linear layer that multiplies in float32 whatever its input's dtype."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        logits = float32_product(input, self.weight)
        return logits if self.bias is None else logits + self.bias.float()


class SonicRouter(TokenChoiceTopKRouter):
    """Stock's router with a float32 gate on every device and auxiliary losses.

    Routing runs on plain local tensors under every SPMD backend: tokens are independent of each
    other, so each rank routes the ones it holds.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        softmax_order: Literal["before", "after"] = "before"
        aux_loss_coeff: float = 0.0
        z_loss_coeff: float = 0.0
        backend: Backend = "auto"
        all_scores: bool = True  # whether the block reads all scores in training: token rounding

    stats: RouterStats

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.softmax_order = config.softmax_order
        self.aux_loss_coeff = config.aux_loss_coeff
        self.z_loss_coeff = config.z_loss_coeff
        self.backend: Backend = config.backend
        self.all_scores = config.all_scores
        self.balance_groups: list[dist.ProcessGroup] = []
        self.loss_share = 1.0
        self.loss_scale: Tensor | None = None

    def forward(
        self, x_BLD: Tensor, expert_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose K experts per token.

        Args:
            x_BLD: (B, L, D).
            expert_bias_E: (E,), picks the experts and never scales them.

        Returns:
            scores (B, L, K) float32, experts (B, L, K) int64, and all scores (B, L, E) float32
            times the route scale, -inf where the token may not go (node-limited groups). Where
            nobody reads all scores they are one 0 seen as (B, L, E).

        Raises:
            ValueError: an auxiliary loss is on and nobody called `set_loss_scale`.
        """
        logits_BLE = self.gate(x_BLD)
        if isinstance(expert_bias_E, DTensor):
            expert_bias_E = expert_bias_E.to_local()
        if not isinstance(logits_BLE, DTensor):
            return self._route(logits_BLE, expert_bias_E)
        mesh, placements = logits_BLE.device_mesh, logits_BLE.placements
        routed = self._route(logits_BLE.to_local(), expert_bias_E)
        wrapped = [DTensor.from_local(t, mesh, placements, run_check=False) for t in routed]
        return wrapped[0], wrapped[1], wrapped[2]

    def _route(
        self, logits_BLE: Tensor, expert_bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, L, E = logits_BLE.shape
        logits_TE = logits_BLE.reshape(B * L, E)
        topk = route_topk(
            logits_TE,
            top_k=self.top_k,
            score_func=self.score_func,
            softmax_order=self.softmax_order,
            renormalize=self.route_norm,
            route_scale=self.route_scale,
            expert_bias_E=expert_bias_E,
            num_groups=self.num_expert_groups,
            num_limited_groups=self.num_limited_groups,
            all_scores=self._needs_all_scores(),
            backend=self.backend,
        )
        if self._debug_force_load_balance:
            topk = self._round_robin(topk)
        if self.training:
            topk = self._observe(logits_TE, topk)
        K, scores_TE = self.top_k, topk.scores_TE
        if not scores_TE.shape[1]:
            scores_TE = self.stats.zero.expand(B * L, E)
        return (
            topk.scores_TK.view(B, L, K),
            topk.ids_TK.view(B, L, K),
            scores_TE.view(B, L, E),
        )

    def _needs_all_scores(self) -> bool:
        rounding = self.all_scores and self.training
        balancing = self.aux_loss_coeff > 0 and self.training
        return rounding or balancing or self._debug_force_load_balance

    def _round_robin(self, topk: TopK) -> TopK:
        """Token after token takes the next K experts, with the scores that they have."""
        ids_TK = torch.arange(topk.ids_TK.numel(), device=topk.ids_TK.device) % self.num_experts
        ids_TK = ids_TK.view_as(topk.ids_TK)
        scores_TK = topk.scores_TE.nan_to_num(neginf=0.0).gather(1, ids_TK)
        if self.route_norm:
            total_T1 = scores_TK.sum(dim=-1, keepdim=True) / self.route_scale
            scores_TK = scores_TK / (total_T1 + RENORMALIZE_EPS)
        return TopK(ids_TK, scores_TK, topk.scores_TE)

    def _observe(self, logits_TE: Tensor, topk: TopK) -> TopK:
        """Attach the auxiliary losses to the scores and add to the statistics."""
        if first_pass():
            self.stats.add(microbatches=1, tokens=logits_TE.shape[0])
            self._add_entropy(logits_TE.detach())
        if not self.aux_loss_coeff and not self.z_loss_coeff:
            return topk
        return self._attach_losses(logits_TE, topk)

    def _attach_losses(self, logits_TE: Tensor, topk: TopK) -> TopK:
        seen: dict[str, Tensor] = {}
        loss = self.stats.zero
        if self.aux_loss_coeff:
            probability_TE = self._probability(logits_TE, topk.scores_TE)
            seen["aux_loss"] = load_balancing_loss(
                probability_TE,
                self.stats.count_choices(topk.ids_TK.flatten()),
                top_k=self.top_k,
                groups=self.balance_groups,
            )
            loss = loss + self.aux_loss_coeff * seen["aux_loss"]
        if self.z_loss_coeff:
            seen["z_loss"] = z_loss(logits_TE)
            loss = loss + self.z_loss_coeff * seen["z_loss"]
        if first_pass():
            self.stats.add(**{name: value.detach() for name, value in seen.items()})
        if self.loss_scale is None:
            raise ValueError(
                "aux_loss_coeff and z_loss_coeff need the weight of a forward pass in the step: "
                "train with SonicTrainer or call sonicmoe_titan.aux_loss.set_loss_scale"
            )
        scores_TK = attach_loss(topk.scores_TK, loss, self.loss_scale)
        return TopK(topk.ids_TK, scores_TK, topk.scores_TE)

    def _probability(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """(T, E) scores before masks and scales, each row summing to 1."""
        if self.score_func == "sigmoid":
            raw_TE = logits_TE.sigmoid()
            return raw_TE / raw_TE.sum(dim=-1, keepdim=True)
        if self.num_expert_groups is not None:
            return logits_TE.softmax(dim=-1)
        return scores_TE if self.route_scale == 1 else scores_TE / self.route_scale

    def _add_entropy(self, logits_TE: Tensor) -> None:
        """Nats summed over all tokens, from a sample: the statistic must cost next to nothing."""
        T = logits_TE.shape[0]
        sample_SE = logits_TE[:: max(1, T // ENTROPY_SAMPLE)]
        if self.score_func == "sigmoid":
            raw_SE = sample_SE.sigmoid()
            probability_SE = raw_SE / raw_SE.sum(dim=-1, keepdim=True)
        else:
            probability_SE = sample_SE.softmax(dim=-1)
        # not special.entr: CUDA compiles that one at run time
        minus_nats = torch.xlogy(probability_SE, probability_SE).sum()
        self.stats.add_entropy(minus_nats, -T / sample_SE.shape[0])

    def parallelize(self, parallel_dims: Any) -> None:
        """Shard the gate as stock does and find the ranks that the losses average over."""
        super().parallelize(parallel_dims)
        self.connect(parallel_dims)

    def connect(self, parallel_dims: ParallelDims) -> None:
        """Find the ranks whose tokens the load-balancing loss counts together."""
        meshes = [parallel_dims.get_optional_mesh("loss")]
        tp_splits_tokens = parallel_dims.tp > 1 and parallel_dims.ep > 1
        if tp_splits_tokens:
            meshes.append(parallel_dims.get_optional_mesh("tp"))
        self.balance_groups = [mesh.get_group() for mesh in meshes if mesh is not None]
        # Gradients are summed over tensor-parallel ranks where these hold different tokens, and
        # under spmd_types also where they hold the same ones.
        summed_over_tp = tp_splits_tokens or parallel_dims.spmd_backend == "spmd_types"
        self.loss_share = 1 / parallel_dims.tp if summed_over_tp else 1.0

    def set_loss_scale(self, scale: float) -> None:
        """See `sonicmoe_titan.aux_loss.set_loss_scale`."""
        if self.loss_scale is None:
            self.loss_scale = torch.zeros((), device=self.stats.load_E.device)
        self.loss_scale.fill_(scale * self.loss_share)
