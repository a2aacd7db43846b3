"""The experts' op on a GPU keeps and needs what the memory model says, by the caching allocator.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import pytest
import torch
from sonicmoe_kernels.backends import HOPPER_CAPABILITY, HOPPER_IMPLEMENTED
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan, route_topk, token_rounding_plan
from torch import Tensor

from sonicmoe_titan.memory_measure import SavedTensors, allocated_bytes
from sonicmoe_titan.memory_model import LayerShape, experts_terms, total
from sonicmoe_titan.memory_peaks import BACKWARD_STAGES, FORWARD_STAGES, peak
from sonicmoe_titan.model_args import ModelArgs

SIZES = (
    # T, D, F, E, K; large enough that the allocator's rounding to 512 bytes does not show
    (8192, 1536, 256, 128, 8),
    (4096, 768, 1024, 32, 2),
)
ROUNDING_ERROR = 0.01


def _shape(size: tuple[int, ...], router: str) -> LayerShape:
    num_tokens, dim, expert_dim, num_experts, top_k = size
    args = ModelArgs(
        num_layers=1,
        dim=dim,
        num_heads=8,
        expert_dim=expert_dim,
        num_experts=num_experts,
        top_k=top_k,
        vocab_size=64,
        router=router,
    )
    return LayerShape(args=args, num_tokens=num_tokens)


def _inputs(shape: LayerShape) -> tuple[Tensor, list[Tensor], RoutingPlan]:
    args = shape.args
    E, F, D = args.num_experts, args.expert_dim, args.dim
    bf16 = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    weights = [torch.randn(sizes, **bf16) for sizes in ((E, F, D), (E, F, D), (E, D, F))]
    x_TD = torch.randn(shape.num_tokens, D, **bf16)
    logits_TE = torch.randn(shape.num_tokens, E, device="cuda")
    routed = route_topk(logits_TE, top_k=args.top_k, renormalize=True)
    if args.router == "topk":
        plan = RoutingPlan.from_topk(routed.ids_TK, routed.scores_TK, num_experts=E)
    else:
        plan = token_rounding_plan(*routed, rounding=args.rounding, tile=args.rounding_tile)
    plan.score_R.requires_grad_()
    return x_TD, weights, plan


@pytest.fixture(params=["torch", "hopper"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "hopper" and not (
        HOPPER_IMPLEMENTED and torch.cuda.get_device_capability() == HOPPER_CAPABILITY
    ):
        pytest.skip("needs our Hopper kernels and compute capability 9.0")
    return request.param


@pytest.mark.parametrize("router", ["topk", "token_rounding"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_experts_keep_what_the_model_predicts_to_the_byte(
    size: tuple[int, ...], router: str, backend: str
) -> None:
    shape = _shape(size, router)
    x_TD, weights, plan = _inputs(shape)
    with SavedTensors(weights) as saved:
        out_TD = moe_experts(x_TD, *weights, plan, backend=backend)
    assert saved.bytes() == total(experts_terms(shape)), saved.read()
    del out_TD


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_leaves_only_h_and_o_allocated(size: tuple[int, ...], backend: str) -> None:
    shape = _shape(size, "topk")
    x_TD, weights, plan = _inputs(shape)
    out_TD, allocated = allocated_bytes(
        lambda: moe_experts(x_TD, *weights, plan, backend=backend), device=x_TD.device
    )
    h = next(term.bytes for term in experts_terms(shape) if term.name == "H")
    expected = h + out_TD.untyped_storage().nbytes()
    assert allocated.live == pytest.approx(expected, rel=ROUNDING_ERROR)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_hopper_peaks_are_what_the_model_predicts(size: tuple[int, ...], backend: str) -> None:
    if backend != "hopper":
        pytest.skip("the model's peaks are those of the hopper kernels")
    shape = _shape(size, "topk")
    x_TD, weights, plan = _inputs(shape)
    h = next(term.bytes for term in experts_terms(shape) if term.name == "H")
    moe_experts(x_TD, *weights, plan, backend=backend).sum().backward()  # loads the kernels
    x_TD.grad = plan.score_R.grad = None
    for weight in weights:
        weight.grad = None

    out_TD, forward = allocated_bytes(
        lambda: moe_experts(x_TD, *weights, plan, backend=backend), device=x_TD.device
    )
    predicted = h + total(peak(shape, FORWARD_STAGES)[1])
    assert forward.peak == pytest.approx(predicted, rel=ROUNDING_ERROR)

    dout_TD = torch.randn_like(out_TD)
    wanted = [x_TD, *weights, plan.score_R]
    _, backward = allocated_bytes(
        lambda: torch.autograd.grad(out_TD, wanted, dout_TD), device=x_TD.device
    )
    _, buffers = peak(shape, BACKWARD_STAGES)
    predicted = sum(term.bytes for term in buffers if term.name != "dO")  # made before the call
    # dS lies in one part per tile of F until it is summed
    assert backward.peak == pytest.approx(predicted, rel=2 * ROUNDING_ERROR)
