"""The block as one operator equals the block by modules, and stands aside where it must.

The stages are played by torch on the CPU; tests/gpu/test_fused.py compares the kernels themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sonicmoe_kernels import block as fused_kernels
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sonicmoe_titan import fused, moe
from sonicmoe_titan.moe import SonicMoE
from tests import emulated_block
from tests.saved_bytes import saved_bytes
from tests.titan.fused_blocks import (
    ROUTERS,
    TILE,
    VARIANTS,
    B,
    E,
    F,
    K,
    L,
    assert_alike,
    build,
    by_modules,
    run,
    tokens,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple]]]:
    """Let blocks be fused on the CPU; the calls of the stages."""
    monkeypatch.setattr(fused, "_are_plain", _are_of)
    monkeypatch.setattr(fused, "resolve_backend", lambda *_: "hopper")
    monkeypatch.setattr(fused, "resolve_topk_backend", lambda *_: "hopper")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    fused._block.cache_clear()
    yield emulated_block.emulate(monkeypatch)
    fused._block.cache_clear()


def _are_of(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    return all(type(t) in (Tensor, nn.Parameter) and t.dtype is dtype for t in tensors)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("router", ["topk", "nearest"])
def test_output_gradients_and_statistics_are_those_of_the_modules(calls, variant, router):
    module = build(variant, **ROUTERS[router])
    expected = run(by_modules(module), tokens())
    assert calls == []
    found = run(module, tokens())
    assert [stage for stage, _ in calls] == 2 * ["forward", "gradients"]
    assert_alike(found, expected)


@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "topk"])
def test_every_rounding_is_that_of_the_modules(calls, router):
    module = build(**ROUTERS[router])
    expected = run(by_modules(module), tokens())
    assert_alike(run(module, tokens()), expected)
    assert calls


def test_the_gate_gradient_of_many_tokens_comes_from_torch(calls, monkeypatch):
    monkeypatch.setattr(fused_kernels, "FEW_TOKENS", B * L - 1)
    module = build()
    expected = run(by_modules(module), tokens())
    assert_alike(run(module, tokens()), expected)
    stages = ["forward", "input_gradient", "weight_gradients"]
    assert [stage for stage, _ in calls] == 2 * stages


@pytest.mark.parametrize("router", ["topk", "nearest"])
def test_evaluation_rounds_and_counts_nothing(calls, router):
    module = build(**ROUTERS[router]).eval()
    expected = run(by_modules(module), tokens())
    found = run(module, tokens())
    assert calls and all(a[-2] == fused.NOTHING for stage, a in calls if stage == "forward")
    assert_alike(found, expected)
    assert found["choices"].sum() == found["tokens"] == 0


def test_without_gradients_the_output_is_the_same_and_nothing_is_kept(calls):
    module = build()
    with torch.no_grad():
        out_BLD = module(tokens())
        expected = by_modules(module)(tokens())
    assert calls and not out_BLD.requires_grad and torch.equal(out_BLD, expected)


@pytest.mark.parametrize("variant", ["renormalised", "scaled"])
@pytest.mark.parametrize("router", ["topk", "nearest"])
def test_bytes_kept_are_h_the_plan_and_the_choice(calls, variant, router):
    module, x_BLD = build(variant, **ROUTERS[router]), tokens()
    kept = saved_bytes(lambda: module(x_BLD), [x_BLD, *module.parameters()])
    T, rounded = B * L, router != "topk"
    rows = T * K + (E * (TILE // 2) if rounded else 0)
    plan = 4 * (4 * rows + (E + 1) + (T + 1))
    over_chosen = variant == "renormalised"
    choice = 8 * T * K + (4 * T * K if over_chosen else 0)
    logits = 4 * T * E if rounded or not over_chosen else 0
    exact = 2 * 2 * F * rows + plan + choice + logits
    assert exact <= kept < exact + 8 * 16  # parts begin at multiples of 16 bytes


def test_recomputation_counts_choices_alone_as_the_modules_do(calls):
    module = build()
    other = by_modules(module)
    for each in (module, other):
        x_BLD = tokens()
        checkpoint(each, x_BLD, use_reentrant=False).backward(torch.ones_like(x_BLD))
    assert [a[-2] for stage, a in calls if stage == "forward"] == [fused.EVERYTHING, fused.CHOICES]
    assert torch.equal(module.tokens_per_expert_E, other.tokens_per_expert_E)
    assert torch.equal(module.stats.load_E, other.stats.load_E)


def test_a_second_backward_raises_torchs_own_error(calls):
    module, x_BLD = build(), tokens()
    out_BLD = module(x_BLD)
    torch.autograd.grad(out_BLD.sum(), x_BLD, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out_BLD.sum(), x_BLD)


def test_a_second_derivative_is_refused_and_leaves_h_alone(calls):
    module, x_BLD = build(), tokens()
    out_BLD = module(x_BLD)
    (dx,) = torch.autograd.grad(out_BLD.sum(), x_BLD, create_graph=True)
    (again,) = torch.autograd.grad(out_BLD.sum(), x_BLD, retain_graph=True)
    assert torch.equal(dx, again)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_a_gradient_that_kernels_cannot_read_is_copied(calls):
    module, x_BLD = build(), tokens()
    (dx,) = torch.autograd.grad(module(x_BLD).sum(), x_BLD)  # of a sum: one number seen as all
    dout_TD = calls[1][1][0]
    assert dout_TD.is_contiguous() and dout_TD.data_ptr() % fused_kernels.ALIGN == 0
    (expected,) = torch.autograd.grad(by_modules(module)(x_BLD).sum(), x_BLD)
    assert_alike({"x": dx}, {"x": expected})


# ------------------------------------------------------------------ where it must not be taken


def _with(change: Callable[[SonicMoE], Any]) -> Callable[[SonicMoE, Tensor], Tensor]:
    def forward(module: SonicMoE, x_BLD: Tensor) -> Tensor:
        change(module)
        return module(x_BLD)

    return forward


def _under(mode: Callable[[], contextlib.AbstractContextManager]) -> Callable[..., Tensor]:
    def forward(module: SonicMoE, x_BLD: Tensor) -> Tensor:
        with mode():
            return module(x_BLD)

    return forward


def _compiled(module: SonicMoE, x_BLD: Tensor) -> Tensor:
    torch.compiler.reset()
    return torch.compile(lambda x: module(x), backend="eager", fullgraph=True)(x_BLD)


def _mapped(module: SonicMoE, x_BLD: Tensor) -> None:
    with contextlib.suppress(RuntimeError):  # the modules' gate refuses transforms
        vmap(lambda scale: module(x_BLD) * scale)(torch.ones(1))


@contextlib.contextmanager
def _autocast() -> Iterator[None]:
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


def _set(path: str, value: Any) -> Callable[[SonicMoE], None]:
    *owners, name = path.split(".")

    def change(module: SonicMoE) -> None:
        owner = module
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)

    return change


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _hook(path: str) -> Callable[[SonicMoE], Any]:
    return lambda module: module.get_submodule(path).register_forward_pre_hook(lambda *_: None)


def _replace_forward(module: SonicMoE) -> None:
    module.router.forward = module.router.forward


def _losses(module: SonicMoE) -> None:
    module.router.z_loss_coeff = 0.1
    module.router.set_loss_scale(1.0)


ASIDE: dict[str, Callable[[SonicMoE, Tensor], Tensor]] = {
    "compiled": _compiled,
    "dispatch mode": _under(Watching),
    "function mode": _under(lambda: torch.device("cpu")),
    "autocast": _under(_autocast),
    "function transform": _mapped,
    "hook on the gate": _with(_hook("router.gate")),
    "hook on the router": _with(_hook("router")),
    "hook on the experts": _with(_hook("routed_experts")),
    "hook on the weights": _with(_hook("routed_experts.inner_experts")),
    "another forward": _with(_replace_forward),
    "auxiliary loss": _with(_losses),
    "forced balance": _with(_set("router._debug_force_load_balance", True)),
    "gate with a bias": _with(
        _set("router.gate.bias", nn.Parameter(torch.zeros(E, dtype=torch.bfloat16)))
    ),
    "frozen weights": _with(lambda m: m.routed_experts.inner_experts.requires_grad_(False)),
    "float32": lambda module, x_BLD: module.float()(x_BLD.float()),
    "nobody wants it": _with(_set("fused_block", "never")),
    "many tokens": lambda module, x_BLD: _with(_set("fused_block", "auto"))(
        module, x_BLD[:1, :1].expand(3, 700, -1).contiguous()
    ),
    "no token": lambda module, x_BLD: module.eval()(x_BLD[:, :0]),
}


@pytest.mark.parametrize("reason", ASIDE)
def test_the_operator_stands_aside(calls, reason):
    ASIDE[reason](build(), tokens())
    assert calls == []


def test_few_tokens_are_one_operator_without_asking(calls):
    module = build()
    module.fused_block = "auto"
    module(tokens())
    assert calls


@pytest.mark.parametrize("change", [("ep_group", object()), ("_has_fixed_top_k", True)])
def test_experts_elsewhere_are_reached_by_the_modules(calls, change):
    module = build()
    setattr(module.routed_experts, *change)
    with contextlib.suppress(Exception):  # there is neither such a group nor such a dispatcher
        module(tokens())
    assert calls == []


def test_a_subclass_runs_its_own_forward(calls):
    module = build()
    module.router.__class__ = type("Own", (type(module.router),), {})
    module(tokens())
    assert calls == []


def test_sizes_that_no_kernel_serves_are_left_to_the_modules(calls, monkeypatch):
    monkeypatch.setattr(fused, "resolve_topk_backend", lambda *_: "torch")
    build()(tokens())
    assert calls == []


def test_a_tile_beyond_the_tokens_is_refused_by_the_modules(calls):
    module = build(router="token_rounding", rounding_tile=B * L + 1)
    with pytest.raises(ValueError, match="rounding tile"):
        module(tokens())


def test_nothing_is_fused_on_a_cpu():
    assert fused.routed_output(build(), tokens(), kinds=moe.FUSED_KINDS) is None
