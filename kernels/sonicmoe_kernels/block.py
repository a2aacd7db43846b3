"""The whole MoE block as one operator with one gradient, for few tokens: the host's time is all
that counts there.

Legend: B batch, L sequence, T = B * L tokens, D model width, F expert width, E experts, K experts
per token, R routed rows (static bound R_max), halves 2 when the activation is gated.

What `gate`, `route_topk`, the plan and `moe_experts` do one by one, by the same kernels in the same
order; results are theirs bit for bit, but for the gradient of x, which is rounded to bf16 once less
often (the gate's share is added to the experts' sums before these are rounded). Kept for backward
is what those keep: x, H, the plan, and the choice's ids with either its weights or the logits.

Host time is spent by the call: kernels are launched from compiled code, several at a time
(cute/block.py), and the small tensors between them are parts of two buffers (block_stages.py).
Where anybody wants to see what happens in between, callers take the modules instead: here is no
dispatcher, no tracing and no second derivative.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels import hopper
from sonicmoe_kernels.block_stages import (
    STAGES,
    BlockLayer,
    BlockStage,
    gradient_parts,
    kept_parts,
    scratch_parts,
    words,
)
from sonicmoe_kernels.parallel_build import make_ready
from sonicmoe_kernels.rounding import STOCHASTIC, rounding_r_max
from sonicmoe_kernels.router_sums import ENTROPY_SAMPLE, Counting, RouterSums
from sonicmoe_kernels.tiles import MAX_PAIRS, MAX_ROUTED_TOKENS, pick_rows

__all__ = ["ALIGN", "FEW_TOKENS", "FusedBlock", "fused_block"]

ALIGN = 16  # bytes; every tensor given here begins at a multiple, as TMA and wide loads need
FEW_TOKENS = 2048
"""Up to so many all gradients are one stage, whose buffer is small beside them. The gate's is a
kernel of ours there: a CTA for each 128 of D, which takes 2T / 64 turns; beyond, cuBLAS splits the
sum over T and is faster than we save in host time."""

REFUSAL = (
    "the MoE block has no second derivative: its backward recomputes activations in fused kernels. "
    "Take gradients without create_graph=True."
)


product = functools.partial(torch.mm, out_dtype=torch.float32)
"""Of bf16 matrices, in float32."""


class Sizes(NamedTuple):
    """What depends on the number of tokens.

    rows: R_max. kept, scratch, gradient: words of the buffers, see `block_stages`. sample_stride:
    every which token counts for the entropy.
    """

    rows: int
    kept: int
    scratch: int
    gradient: int
    sample_stride: int


class FusedBlock:
    """The compiled stages of layers that are alike, on one device.

    Args:
        layer: what they are compiled for.
        tile: rows of a tile of token rounding; ignored without.
        route_scale: factor on all scores.
        device: a Hopper GPU.
    """

    def __init__(
        self, layer: BlockLayer, *, tile: int, route_scale: float, device: torch.device
    ) -> None:
        self.layer, self.tile, self.route_scale, self.device = layer, tile, route_scale, device
        stages = [BlockStage(stage, layer) for stage in STAGES]
        make_ready(stages)
        self.output, self.gradients, self.input_gradient, self.weight_gradients = map(
            kernel_cache.load, stages
        )
        self.num_ctas = hopper.num_ctas(device.index)
        self.draws = layer.rounding in STOCHASTIC
        self.reads_logits = layer.rounding is not None or not layer.routing.over_chosen
        self._sizes: dict[int, Sizes | None] = {}

    def sizes(self, num_tokens: int) -> Sizes | None:
        """Of so many tokens; None where there is nothing to do or the kernels do not serve them."""
        try:
            return self._sizes[num_tokens]
        except KeyError:
            self._sizes[num_tokens] = found = self._find_sizes(num_tokens)
            return found

    def _find_sizes(self, num_tokens: int) -> Sizes | None:
        layer, routing = self.layer, self.layer.routing
        too_many = num_tokens > MAX_ROUTED_TOKENS or num_tokens * routing.num_experts >= MAX_PAIRS
        if not num_tokens or too_many or (layer.rounding is not None and self.tile > num_tokens):
            return None
        rows = num_tokens * routing.top_k
        if layer.rounding is not None:
            rows = rounding_r_max(
                rows, num_tokens, routing.num_experts, rounding=layer.rounding, tile=self.tile
            )
        gemm = pick_rows(
            "d_hidden",
            d=layer.d,
            f=layer.f,
            num_experts=routing.num_experts,
            activation=layer.activation,
        )
        return Sizes(
            rows=rows,
            kept=words(kept_parts(layer, num_tokens, rows)),
            scratch=words(scratch_parts(layer, num_tokens, rows)),
            gradient=words(gradient_parts(layer, num_tokens, rows, gemm.n_tiles)),
            sample_stride=max(1, num_tokens // ENTROPY_SAMPLE),
        )

    def __call__(
        self,
        x_BLD: Tensor,
        gate_ED: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor | None,
        w2_EDF: Tensor,
        *,
        bias_E: Tensor | None,
        sums: RouterSums,
        counting: Counting,
    ) -> Tensor:
        """(B, L, D): each token's experts' outputs times their scores, summed.

        Differentiable once in all tensors but the bias. Everything is a plain contiguous tensor on
        `device`, which is the current one, aligned to ALIGN, and bf16 but for the float32 bias and
        sums; `sizes` knows the number of tokens. Nothing of that is checked.

        Args:
            x_BLD: tokens.
            gate_ED: the router's weight.
            w1_EFD, w3_EFD, w2_EDF: the experts' weights, see `moe_experts`.
            bias_E: added for the choice alone, given where the layer has a bias.
            sums: what to add the statistics to.
            counting: which.
        """
        return _Block.apply(self, sums, counting, bias_E, x_BLD, gate_ED, w1_EFD, w3_EFD, w2_EDF)

    def forward(
        self,
        x_BLD: Tensor,
        gate_ED: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor | None,
        w2_EDF: Tensor,
        bias_E: Tensor | None,
        sums: RouterSums,
        counting: Counting,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output, and what backward reads: the kept buffer and the logits."""
        empty, device, layer = torch.empty, self.device, self.layer
        x_TD = x_BLD.view(-1, layer.d)
        size = self._sizes[x_TD.shape[0]]
        assert size is not None
        logits_TE = product(x_TD, gate_ED.t())
        uniform_E = torch.rand(gate_ED.shape[0], device=device) if self.draws else None
        kept = empty(size.kept, dtype=torch.int32, device=device)
        scratch = empty(size.scratch, dtype=torch.int32, device=device)
        out_BLD = torch.empty_like(x_BLD)
        self.output(
            x_BLD,
            logits_TE,
            bias_E,
            uniform_E,
            w1_EFD,
            w3_EFD,
            w2_EDF,
            kept,
            scratch,
            out_BLD,
            *sums,
            size.rows,
            self.route_scale,
            self.tile,
            size.sample_stride,
            counting,
            self.num_ctas,
        )
        return out_BLD, kept, logits_TE if self.reads_logits else None

    def backward(
        self,
        dout_BLD: Tensor,
        x_BLD: Tensor,
        gate_ED: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor | None,
        w2_EDF: Tensor,
        kept: Tensor,
        logits_TE: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Gradients of x, gate, w1, w3 and w2; dH takes the place of H in the kept buffer."""
        like, num_tokens = torch.empty_like, x_BLD.shape[0] * x_BLD.shape[1]
        size = self._sizes[num_tokens]
        assert size is not None
        scratch = torch.empty(size.gradient, dtype=torch.int32, device=self.device)
        dw2_EDF, dx_BLD, dgate_ED = like(w2_EDF), like(x_BLD), like(gate_ED)
        inputs = (dout_BLD, x_BLD, logits_TE, gate_ED, w1_EFD, w3_EFD, w2_EDF, kept, scratch)
        numbers = (size.rows, self.route_scale, self.num_ctas)
        if num_tokens <= FEW_TOKENS:
            dw1_EFD, dw3_EFD = like(w1_EFD), None if w3_EFD is None else like(w3_EFD)
            self.gradients(*inputs, dw2_EDF, dx_BLD, dgate_ED, dw1_EFD, dw3_EFD, *numbers)
        else:
            self.input_gradient(*inputs, dw2_EDF, dx_BLD, None, None, None, *numbers)
            _gate_gradient(scratch, x_BLD.view(-1, self.layer.d), dgate_ED)
            del inputs, scratch  # before the greatest gradients are made, as in hopper_experts
            dw1_EFD, dw3_EFD = like(w1_EFD), None if w3_EFD is None else like(w3_EFD)
            self.weight_gradients(x_BLD, kept, dw1_EFD, dw3_EFD, size.rows, self.num_ctas)
        return dx_BLD, dgate_ED, dw1_EFD, dw3_EFD, dw2_EDF


def _gate_gradient(scratch: Tensor, x_TD: Tensor, dgate_ED: Tensor) -> None:
    """Writes the gate's gradient by cuBLAS, from the halves with which the buffer begins."""
    (T, _), E = x_TD.shape, dgate_ED.shape[0]
    halves_T2E = scratch[: T * E].view(torch.bfloat16).view(T, 2 * E)
    dgate_2ED = product(halves_T2E.t(), x_TD)
    torch.add(*dgate_2ED.split(E), out=dgate_ED)


fused_block = functools.cache(FusedBlock)
"""A FusedBlock, the same for the same arguments."""


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: FusedBlock,
        sums: RouterSums,
        counting: Counting,
        bias_E: Tensor | None,
        x_BLD: Tensor,
        *weights: Any,
    ) -> Tensor:
        gate_ED, w1_EFD, w3_EFD, w2_EDF = weights
        out_BLD, *kept = block.forward(
            x_BLD, gate_ED, w1_EFD, w3_EFD, w2_EDF, bias_E, sums, counting
        )
        ctx.block = block
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_BLD, *weights, *kept)
        return out_BLD

    @staticmethod
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, dout_BLD: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dout_BLD is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, block = ctx.saved_tensors, ctx.block
        if not dout_BLD.is_contiguous() or dout_BLD.data_ptr() % ALIGN:
            dout_BLD = dout_BLD.clone(memory_format=torch.contiguous_format)
        *inputs, kept, logits = saved
        if torch.is_grad_enabled():  # create_graph
            with torch.no_grad():
                gradients = block.backward(dout_BLD, *inputs, kept.clone(), logits)
            gradients = _Once.apply(gradients, dout_BLD, *saved)
        else:
            # a second backward through the same graph raises torch's own error
            torch.autograd.graph.increment_version(kept)
            gradients = block.backward(dout_BLD, *inputs, kept, logits)
        return None, None, None, None, *gradients


class _Once(torch.autograd.Function):
    """Gradients as they are; theirs is refused."""

    @staticmethod
    def forward(
        ctx: Any, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(REFUSAL)
