"""Blocks that may be fused and the same by modules, and how their results are compared.

python -m tests.titan.fused_blocks [--jobs N]    compile what tests/gpu/test_fused.py loads
"""

from __future__ import annotations

import argparse
import copy
from typing import Any
from unittest.mock import patch

import torch
from sonicmoe_kernels.block import FusedBlock
from sonicmoe_kernels.kernel_lists import block_specs, plan_specs, specs, topk_specs
from sonicmoe_kernels.rounding import ROUNDINGS
from sonicmoe_kernels.tiles import TopKOptions
from sonicmoe_kernels.warmup import warm_up
from torch import Tensor, nn
from torchtitan.config import derive
from torchtitan.models.common.config_utils import make_ffn_config

from sonicmoe_titan.conversion import to_sonic
from sonicmoe_titan.moe import SonicMoE
from tests.titan import moe_blocks

B, L, D, F, E, K = 2, 48, 64, 64, 64, 4
SIZES = {"small": (D, F, E, K), "7b": (1536, 256, 128, 8), "wide": (1024, 512, 64, 6)}
TILE = 8
STD = 2.4  # of weights times sqrt(D): logits and gates of that size
CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "renormalised": {"score_func": "softmax", "route_norm": True},
    "scaled": {"score_func": "softmax", "route_norm": False, "route_scale": 2.5},
    "softmax after": {"score_func": "softmax", "softmax_order": "after"},
    "sigmoid, bias": {"score_func": "sigmoid", "route_norm": True, "bias": True},
    "shared experts": {"score_func": "softmax", "route_norm": True, "shared": True},
}


def build(
    variant: str = "renormalised",
    *,
    sizes: tuple[int, int, int, int] = (D, F, E, K),
    backend: str = "torch",
    device: torch.device = CPU,
    **options: Any,
) -> SonicMoE:
    """A block in bf16, its modules on `backend`.

    sizes: D, F, E and K. options: those of `to_sonic`.
    """
    given = dict(VARIANTS[variant])
    order = given.pop("softmax_order", "before")
    shared, bias = given.pop("shared", False), given.pop("bias", False)
    config = moe_blocks.stock_config("qwen3", sizes=sizes, router=given)
    if shared:
        normal = {"w1_param_init": nn.init.normal_, "w2w3_param_init": nn.init.normal_}
        config.shared_experts = make_ffn_config(dim=sizes[0], hidden_dim=sizes[1], **normal)
    config = derive(config, type(config), load_balance_coeff=1e-3 if bias else None)
    if options.get("router") == "token_rounding":
        options = {"rounding_tile": TILE} | options
    options |= {"backend": backend, "softmax_order": order, "fused_block": "always"}
    built = to_sonic(config, **options).build()
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=STD * sizes[0] ** -0.5, generator=generator)
    built.to(device, torch.bfloat16)
    built._init_self_buffers(buffer_device=device)
    if built.expert_bias_E is not None:
        built.expert_bias_E.copy_(torch.linspace(-0.3, 0.3, sizes[2]))
    return built


def tokens(*shape: int, device: torch.device = CPU) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(shape or (B, L, D), generator=generator)
    return drawn.to(device, torch.bfloat16).requires_grad_()


ROUTERS = {"topk": {}} | {
    rounding: {"router": "token_rounding", "rounding": rounding} for rounding in ROUNDINGS
}


def by_modules(module: SonicMoE) -> SonicMoE:
    """A copy that never is fused: a hook on its router forbids it."""
    other = copy.deepcopy(module)
    other.router.register_forward_hook(lambda *_: None)
    return other


def run(module: SonicMoE, x_BLD: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the second of two passes, and everything counted by both."""
    found: dict[str, Tensor] = {}
    for turn in range(2):
        torch.manual_seed(turn)
        out_BLD = module(x_BLD)
        wanted = [t for t in (x_BLD, *module.parameters()) if t.requires_grad]
        dout_BLD = torch.randn(out_BLD.shape, generator=torch.Generator().manual_seed(2))
        gradients = torch.autograd.grad(out_BLD, wanted, dout_BLD.to(out_BLD))
        names = ["x", *(name for name, _ in module.named_parameters())]
        found |= {"out": out_BLD.detach()} | dict(zip(names, gradients, strict=True))
    found["choices"], found["load"] = module.tokens_per_expert_E, module.stats.load_E
    return found | dict(zip(module.stats.NAMES, module.stats.values_V, strict=True))


# Summed in another order or rounded less often: one unit of bf16 in each of x's two summands, which
# may be larger than their sum.
SUMMED_ONCE = ("x", "router.gate.weight", "entropy")
UNIT = 2**-8


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        bound = {"rtol": 0.0, "atol": 0.0}
        if name in SUMMED_ONCE:
            bound = {"rtol": 2 * UNIT, "atol": 4 * UNIT * float(value.abs().mean())}
        torch.testing.assert_close(value, other[name], **bound, msg=lambda m, n=name: f"{n}: {m}")


def fused_calls() -> Any:
    """A context whose value counts in `call_count` how often the operator ran."""
    call = FusedBlock.__call__
    return patch.object(FusedBlock, "__call__", autospec=True, side_effect=call)


def kernels(sizes: tuple[int, int, int, int], variant: str, rounding: str | None) -> list[Any]:
    """What a block launches, as one operator and by modules, with token choice and a rounding."""
    (d, f, num_experts, top_k), given = sizes, VARIANTS[variant]
    experts = {"num_experts": num_experts, "top_k": top_k}
    routing = TopKOptions(
        **experts,
        score_func=given["score_func"],
        softmax_order=given.get("softmax_order", "before"),
        renormalize=given.get("route_norm", False),
        has_bias=given.get("bias", False),
    )
    return [
        *specs(d=d, f=f, **experts),
        *topk_specs(routing),
        *plan_specs(**experts, rounding=rounding),
        *block_specs(routing, d=d, f=f, rounding=rounding),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, help="processes; one per core otherwise")
    wanted = [(sizes, "renormalised", "nearest") for sizes in SIZES.values()]
    wanted += [(SIZES["small"], "renormalised", rounding) for rounding in ROUNDINGS]
    wanted += [(SIZES["small"], variant, "nearest") for variant in VARIANTS]
    warm_up([spec for one in wanted for spec in kernels(*one)], jobs=parser.parse_args().jobs)


if __name__ == "__main__":
    main()
