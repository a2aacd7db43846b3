"""One MoE block of the trainer on a CUDA device, for what asks about its host cost.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan
from torch import Tensor

from sonicmoe_titan.model import decoder_config
from sonicmoe_titan.model_args import ModelArgs

T, D, F, E, K = 1024, 1536, 256, 128, 8  # the 7B model's layer, few tokens


def backward(out: Tensor, wanted: list[Tensor], dout: Tensor) -> None:
    """A backward pass in the thread that calls, as the trainer runs it."""
    with torch.autograd.set_multithreading_enabled(False):
        torch.autograd.grad(out, wanted, dout)


class Subject(Protocol):
    """What is timed: the host enqueues a forward pass, then a backward pass."""

    def forward(self) -> Tensor: ...

    def backward(self, out: Tensor) -> None: ...


class HostExperts:
    """`moe_experts` with a given plan, one after the other, each with its weights."""

    def __init__(self, *, count: int = 1) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

        self.x_TD = draw(T, D)
        self.layers = [(draw(E, F, D), draw(E, F, D), draw(E, D, F)) for _ in range(count)]
        self.dout_TD = torch.randn_like(self.x_TD)
        # any routing will do: token t on experts t, t + 1, ...
        ids_TK = (torch.arange(T)[:, None] + torch.arange(K)) % E
        plan = RoutingPlan.from_topk(ids_TK, torch.full((T, K), 1 / K), num_experts=E)
        tensors = (plan.token_idx_R, plan.score_R, plan.expert_offsets, plan.token_offsets)
        self.plan = RoutingPlan(
            *(t.cuda() for t in (*tensors, plan.token_rows_R)), rows_per_token=K, num_tokens=T
        )
        self.plan.score_R.requires_grad_()

    def forward(self) -> Tensor:
        out_TD = self.x_TD
        for weights in self.layers:
            out_TD = moe_experts(out_TD, *weights, self.plan, backend="hopper")
        return out_TD

    def backward(self, out: Tensor) -> None:
        weights = (weight for layer in self.layers for weight in layer)
        backward(out, [self.x_TD, *weights, self.plan.score_R], self.dout_TD)


class HostBlocks:
    """Blocks of the trainer one after the other, each with its weights, in training and in bf16."""

    def __init__(self, router: str, *, count: int = 1) -> None:
        args = ModelArgs(
            num_layers=count,
            num_heads=D // 64,
            dim=D,
            expert_dim=F,
            num_experts=E,
            top_k=K,
            vocab_size=512,
            backend="hopper",
            router="topk" if router == "topk" else "token_rounding",
            rounding="nearest" if router == "topk" else router,
        )
        device = torch.device("cuda")
        with device:
            layers = decoder_config(args, seq_len=T).layers
            self.blocks = torch.nn.ModuleList(layer.moe.build() for layer in layers)
        self.blocks.to(torch.bfloat16)
        for block in self.blocks:
            block._init_self_buffers(buffer_device=device)
        for parameter in self.blocks.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.x_BLD = torch.randn(1, T, D, device=device, dtype=torch.bfloat16)
        self.x_BLD.requires_grad_()
        self.dout_BLD = torch.randn_like(self.x_BLD)
        self.wanted = [self.x_BLD, *self.blocks.parameters()]

    def forward(self) -> Tensor:
        out_BLD = self.x_BLD
        for block in self.blocks:
            out_BLD = block(out_BLD)
        return out_BLD

    def backward(self, out: Tensor) -> None:
        backward(out, self.wanted, self.dout_BLD)
