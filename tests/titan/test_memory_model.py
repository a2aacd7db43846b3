"""The analytic memory model against what autograd keeps."""

import pytest
import torch
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import ROUNDINGS, RoutingPlan, route_topk, token_rounding_plan
from torch import Tensor

from sonicmoe_titan.aux_loss import set_loss_scale
from sonicmoe_titan.memory_measure import SavedTensors
from sonicmoe_titan.memory_model import LayerShape, experts_terms, moe_terms, total
from sonicmoe_titan.model import decoder_config
from sonicmoe_titan.model_args import ModelArgs
from tests.emulated_topk import emulate

SIZES = (
    # tokens, D, F, E, K
    (64, 64, 32, 4, 1),
    (96, 32, 64, 8, 2),
    (130, 64, 16, 16, 8),
)


def _args(size: tuple[int, ...], **changes: object) -> ModelArgs:
    _, dim, expert_dim, num_experts, top_k = size
    given = dict(
        num_layers=2,
        dim=dim,
        num_heads=4,
        expert_dim=expert_dim,
        num_experts=num_experts,
        top_k=top_k,
        vocab_size=64,
        rounding_tile=16,
    )
    return ModelArgs(**{**given, **changes})


def _plan(args: ModelArgs, num_tokens: int, router: str, rounding: str) -> RoutingPlan:
    logits_TE = torch.randn(num_tokens, args.num_experts, requires_grad=True)
    chosen = route_topk(logits_TE, top_k=args.top_k, renormalize=True)
    if router == "topk":
        return RoutingPlan.from_topk(chosen.ids_TK, chosen.scores_TK, num_experts=args.num_experts)
    return token_rounding_plan(*chosen, rounding=rounding, tile=args.rounding_tile)


def _weights(args: ModelArgs, dtype: torch.dtype) -> list[Tensor]:
    E, F, D = args.num_experts, args.expert_dim, args.dim
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rounding", ["topk", *ROUNDINGS])
def test_experts_keep_what_the_model_predicts_to_the_byte(
    size: tuple[int, ...], rounding: str, dtype: torch.dtype
) -> None:
    router = "topk" if rounding == "topk" else "token_rounding"
    changes = {} if router == "topk" else {"rounding": rounding}
    args = _args(size, router=router, **changes)
    plan = _plan(args, size[0], router, rounding)
    weights = _weights(args, dtype)
    x_TD = torch.randn(size[0], args.dim, dtype=dtype, requires_grad=True)

    with SavedTensors(weights) as saved:
        out_TD = moe_experts(x_TD, *weights, plan, backend="torch")

    shape = LayerShape(args=args, num_tokens=size[0], value_bytes=dtype.itemsize)
    assert saved.bytes() == total(experts_terms(shape)), saved.read()
    del out_TD
    assert saved.bytes() == 0


BLOCKS = [
    {},
    {"renormalize": False},
    {"softmax_order": "after"},
    {"score_func": "sigmoid", "route_scale": 2.5},
    {"shared_expert_dim": 48},
    {"router": "token_rounding"},
    {"router": "token_rounding", "rounding": "up", "score_func": "sigmoid"},
    {"router": "token_rounding", "rounding": "balance", "shared_expert_dim": 16},
    {"load_balance_coeff": 1e-3, "num_expert_groups": 2, "num_limited_groups": 1},
    {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
    {"router": "token_rounding", "aux_loss_coeff": 0.01},
    {"score_func": "sigmoid", "aux_loss_coeff": 0.01},
    {"softmax_order": "after", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
    {"aux_loss_coeff": 0.01, "num_expert_groups": 2, "num_limited_groups": 1},
]


@pytest.mark.parametrize("changes", BLOCKS, ids=str)
@pytest.mark.parametrize("routing_kernel", [False, True], ids=["torch_routes", "kernel_routes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_moe_block_keeps_what_the_model_predicts_within_one_percent(
    size: tuple[int, ...],
    changes: dict[str, object],
    dtype: torch.dtype,
    routing_kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if routing_kernel:
        emulate(monkeypatch)
    args = _args(size, **changes)
    args.validate()
    block = decoder_config(args, seq_len=size[0]).layers[0].moe.build().to(dtype)
    set_loss_scale([block], 1.0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x_BLD = torch.randn(2, size[0] // 2, args.dim, dtype=dtype, requires_grad=True)

    with SavedTensors([*block.parameters(), *block.buffers()]) as saved:
        out_BLD = block(x_BLD)

    shape = LayerShape(
        args=args, num_tokens=size[0], value_bytes=dtype.itemsize, on_gpu=routing_kernel
    )
    predicted = total(moe_terms(shape))
    assert saved.bytes() == pytest.approx(predicted, rel=0.01), saved.read()
    out_BLD.float().sum().backward()
