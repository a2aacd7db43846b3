"""x W^T in float32 for the router's gate, at bf16's speed and without a float32 copy of x.

Legend: T tokens, D model width, E experts; on the CPU any leading dimensions in place of T.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def float32_product(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """(T, E) float32 x W^T, summed in float32; keeps x and W as they come for backward.

    Gradients are computed in float32 and rounded once, to the dtypes of x and W. bf16 on a CUDA
    device goes through the tensor cores: products of bf16 numbers are exact in float32, and the
    float32 gradient of the logits travels as two bf16 numbers, which carry 16 of its 24 bits.
    """
    return _Float32Product.apply(x_TD, weight_ED)


class _Float32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _on_tensor_cores(x, weight):
            logits_TE = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            return logits_TE.view(*x.shape[:-1], -1)
        return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        if _on_tensor_cores(x, weight):
            return _backward_in_halves(dlogits, x, weight)
        # summed over the batch afterwards: folding a batch into rows is no DTensor operation
        dweight = torch.matmul(dlogits.transpose(-1, -2), x.float())
        if dweight.ndim > 2:
            dweight = dweight.sum(0)
        return torch.matmul(dlogits, weight.float()).to(x.dtype), dweight.to(weight.dtype)


def _on_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    plain = type(x) is Tensor or torch.compiler.is_compiling()  # DTensor has no such product
    return plain and x.is_cuda and x.dtype == weight.dtype == torch.bfloat16


def _backward_in_halves(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    halves_T2E = _halves(dlogits.flatten(0, -2))
    dx_TD = halves_T2E @ torch.cat([weight, weight])
    dweight_2ED = torch.mm(halves_T2E.t(), x.flatten(0, -2), out_dtype=torch.float32)
    return dx_TD.view_as(x), _rounded_sum(*dweight_2ED.view(2, *weight.shape), like=weight)


def _may_use_out() -> bool:
    """Whether `out` saves launches: a compiler fuses by itself, and autograd refuses it."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled())


def _halves(dlogits_TE: Tensor) -> Tensor:
    """(T, 2E) bf16: what bf16 holds of each number, and what it holds of the rest."""
    if not _may_use_out():
        high_TE = dlogits_TE.bfloat16()
        return torch.cat([high_TE, (dlogits_TE - high_TE).bfloat16()], dim=1)
    T, E = dlogits_TE.shape
    halves_T2E = torch.empty((T, 2 * E), dtype=torch.bfloat16, device=dlogits_TE.device)
    high_TE, low_TE = halves_T2E[:, :E], halves_T2E[:, E:]
    high_TE.copy_(dlogits_TE)
    torch.sub(dlogits_TE, high_TE, out=low_TE)
    return halves_T2E


def _rounded_sum(a: Tensor, b: Tensor, *, like: Tensor) -> Tensor:
    """a + b in their float32, rounded once to the dtype of `like`."""
    if not _may_use_out():
        return (a + b).to(like.dtype)
    return torch.add(a, b, out=torch.empty_like(like))
