"""The router: a float32 gate and token choice, under every SPMD backend.

Legend: B batch, L sequence, D model width, E experts, K experts per token, T = B * L tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from sonicmoe_titan.stats import RouterStats


class _Float32Product(torch.autograd.Function):
    """x W^T in float32 that keeps x and W as they come: a float32 copy of a bf16 x would weigh
    twice what the experts keep of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        # summed over the batch afterwards: folding a batch into rows is no DTensor operation
        dweight = torch.matmul(dlogits.transpose(-1, -2), x.float())
        if dweight.ndim > 2:
            dweight = dweight.sum(0)
        return torch.matmul(dlogits, weight.float()).to(x.dtype), dweight.to(weight.dtype)


class Float32Gate(Linear):
    """A linear layer that multiplies in float32 whatever its input's dtype."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        logits = _Float32Product.apply(input, self.weight)
        return logits if self.bias is None else logits + self.bias.float()


class SonicRouter(TokenChoiceTopKRouter):
    """Stock's router with a float32 gate on every device, softmax before or after the top-k."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        softmax_order: Literal["before", "after"] = "before"
        aux_loss_coeff: float = 0.0
        z_loss_coeff: float = 0.0

    stats: RouterStats

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.softmax_order = config.softmax_order
        self.aux_loss_coeff = config.aux_loss_coeff
        self.z_loss_coeff = config.z_loss_coeff

    def forward(
        self, x_BLD: Tensor, expert_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose K experts per token.

        Args:
            x_BLD: (B, L, D).
            expert_bias_E: (E,), picks the experts and never scales them.

        Returns:
            scores (B, L, K) float32, experts (B, L, K) int64, and all scores (B, L, E) float32
            times the route scale, -inf where the token may not go (node-limited groups).
        """
        logits_BLE = self.gate(x_BLD)
        if expert_bias_E is not None and isinstance(expert_bias_E, DTensor):
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
        from sonicmoe_kernels.routing import route_topk

        B, L, E = logits_BLE.shape
        logits_TE = logits_BLE.reshape(B * L, E)
        ids_TK, scores_TK, scores_TE = route_topk(
            logits_TE,
            top_k=self.top_k,
            score_func=self.score_func,
            softmax_order=self.softmax_order,
            renormalize=self.route_norm,
            route_scale=self.route_scale,
            expert_bias_E=expert_bias_E,
            num_groups=self.num_expert_groups,
            num_limited_groups=self.num_limited_groups,
        )
        if self._debug_force_load_balance:
            ids_TK = torch.arange(ids_TK.numel(), device=ids_TK.device).view_as(ids_TK) % E
            scores_TK = scores_TE.gather(1, ids_TK)
        K = self.top_k
        return scores_TK.view(B, L, K), ids_TK.view(B, L, K), scores_TE.view(B, L, E)
