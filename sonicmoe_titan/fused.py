"""When a MoE block runs as one operator instead of module by module.

Eager and on few tokens the host's time counts, of which modules and operators cost more than
kernels. Whenever anybody could see the difference (a tracer, a mode, a hook, a sharded tensor) or
the operator lacks something (groups, auxiliary losses, expert parallelism), the modules run.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from sonicmoe_kernels.backends import resolve_backend, resolve_topk_backend
from sonicmoe_kernels.block import ALIGN, FEW_TOKENS, FusedBlock, fused_block
from sonicmoe_kernels.block_stages import BlockLayer, why_illegal_block
from sonicmoe_kernels.thin_autograd import somebody_watches
from sonicmoe_kernels.tiles import TopKOptions
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sonicmoe_titan import model_args
from sonicmoe_titan.stats import first_pass

if TYPE_CHECKING:
    from sonicmoe_titan.moe import SonicMoE

NOTHING, CHOICES, EVERYTHING = 0, 1, 2  # what a pass adds to the statistics


def is_wanted(option: model_args.FusedBlock, num_tokens: int) -> bool:
    """Whether `model.fused_block` asks for the operator in passes of so many tokens."""
    return option == "always" or (option == "auto" and num_tokens <= FEW_TOKENS)


def routed_output(
    moe: SonicMoE, x_BLD: Tensor, *, kinds: tuple[type[nn.Module], ...]
) -> Tensor | None:
    """The routed experts' (B, L, D) by the fused operator, or None: then the modules have to run.

    Args:
        moe: the block.
        x_BLD: its input.
        kinds: the classes for which the operator stands in: of router, gate, routed experts and
            their weights.
    """
    if somebody_watches() or torch._C._len_torch_function_stack() > 0:
        return None
    if x_BLD.ndim != 3 or torch.is_autocast_enabled("cuda"):
        return None
    B, L, D = x_BLD.shape  # not sooner: a tracer would compile again for another
    if not is_wanted(moe.fused_block, B * L):
        return None
    # not by attribute: nn.Module looks those up in Python, 0.4 us each
    modules: dict[str, Any] = moe._modules
    buffers: dict[str, Any] = moe._buffers
    router, experts = modules["router"], modules["routed_experts"]
    gate, weights = router._modules["gate"], experts._modules["inner_experts"]
    if not _are_untouched((router, gate, experts, weights), kinds):
        return None
    if gate._parameters["bias"] is not None or not _is_plain_layer(router, experts):
        return None
    gate_ED, parameters = gate._parameters["weight"], weights._parameters
    w1, w3, w2 = parameters["w1_EFD"], parameters["w3_EFD"], parameters["w2_EDF"]
    bias_E, choices_E = buffers.get("expert_bias_E"), buffers["tokens_per_expert_E"]
    halves = (x_BLD, gate_ED, w1, w3, w2)
    if not _are_plain(halves, torch.bfloat16) or not _are_plain((choices_E,), torch.float32):
        return None
    if bias_E is not None and not _are_plain((bias_E,), torch.float32):
        return None
    if torch.is_grad_enabled() and len({tensor.requires_grad for tensor in halves}) > 1:
        return None  # the operator computes all gradients
    if w1.shape[2] != D:
        return None  # the modules say what is wrong
    training = moe.training
    block = _block_for(router, experts, x_BLD, w1, training=training, has_bias=bias_E is not None)
    if block is None or block.sizes(B * L) is None:
        return None
    counting = NOTHING if not training else EVERYTHING if first_pass() else CHOICES
    sums = moe.stats.sums(choices_E)
    return block(x_BLD, gate_ED, w1, w3, w2, bias_E=bias_E, sums=sums, counting=counting)


def _are_untouched(modules: tuple[Any, ...], kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether calling each module would run the forward of its class and nothing else."""
    if _has_any_global_hook():
        return False
    for module, kind in zip(modules, kinds, strict=True):
        own = module.__dict__
        if type(module) is not kind or "forward" in own or own.get("_compiled_call_impl"):
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return False
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
    return True


def _is_plain_layer(router: Any, experts: Any) -> bool:
    """Whether router and experts are set up for nothing that the operator lacks."""
    if router.aux_loss_coeff or router.z_loss_coeff or router._debug_force_load_balance:
        return False
    if router.num_expert_groups is not None:
        return False
    return experts.ep_group is None and not experts._has_fixed_top_k


def _are_plain(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether they are what the kernels read: no subclass, contiguous, aligned, on a GPU."""
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not nn.Parameter) or tensor.dtype is not dtype:
            return False
        if not tensor.is_cuda or not tensor.is_contiguous() or tensor.data_ptr() % ALIGN:
            return False
    return True


def _block_for(
    router: Any, experts: Any, x_BLD: Tensor, w1_EFD: Tensor, *, training: bool, has_bias: bool
) -> FusedBlock | None:
    """The operator of layers that are set up like this one, or None where kernels have limits."""
    config, device = experts.config, x_BLD.device
    if device.index != torch.cuda.current_device():
        return None  # kernels launch on the current one
    rounding, tile = None, 0
    if training and config.router != "topk":
        rounding, tile = config.rounding, config.rounding_tile
        if not router.all_scores:
            return None
    return _block(
        config.backend,
        router.backend,
        device,
        w1_EFD.shape,
        router.top_k,
        router.score_func,
        router.softmax_order,
        router.route_norm,
        router.route_scale,
        has_bias,
        rounding,
        tile,
    )


@functools.cache
def _block(
    experts_backend: str,
    router_backend: str,
    device: torch.device,
    shape: torch.Size,
    top_k: int,
    score_func: Any,
    softmax_order: Any,
    renormalize: bool,
    route_scale: float,
    has_bias: bool,
    rounding: str | None,
    tile: int,
) -> FusedBlock | None:
    num_experts, f, d = shape
    routing = TopKOptions(
        num_experts, top_k, "float32", score_func, softmax_order, renormalize, has_bias
    )
    layer = BlockLayer(routing, rounding, d, f)
    after_sigmoid = score_func == "sigmoid" and softmax_order == "after"
    if after_sigmoid or not route_scale > 0 or why_illegal_block(layer) is not None:
        return None
    if resolve_backend(experts_backend, device, torch.bfloat16, d, f) != "hopper":
        return None
    routes = resolve_topk_backend(router_backend, device, torch.float32, num_experts, top_k)
    if routes != "hopper":
        return None
    return fused_block(layer, tile=tile, route_scale=route_scale, device=device)
