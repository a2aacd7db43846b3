"""What the MoE block launches on the hopper backend, compiled and under activation checkpointing.

Run on the dry GPU (tests/dry_gpu.py), where no kernel of ours runs either; prints, as JSON, the
kernels of ours that each scenario launched or the message of the error it ended with.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from sonicmoe_kernels import ops, routing_ops
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from scripts import host_cost
from tests.host_block import HostBlocks

SAVED = {*ops.SAVE_OPS, *routing_ops.SAVE_OPS}


def _policy(_context: Any, op: Any, *_arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def _eager(layer: HostBlocks) -> Tensor:
    return layer.forward()


def _compiled(layer: HostBlocks) -> Tensor:
    run = torch.compile(lambda x_BLD: layer.blocks[0](x_BLD), fullgraph=True, backend="aot_eager")
    return run(layer.x_BLD)


def _full_ac(layer: HostBlocks) -> Tensor:
    return checkpoint(layer.blocks[0], layer.x_BLD, use_reentrant=False)


def _selective_ac(layer: HostBlocks) -> Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(layer.blocks[0], layer.x_BLD, use_reentrant=False, context_fn=contexts)


def _second_backward(layer: HostBlocks) -> Tensor:
    out = layer.forward()
    torch.autograd.grad(out, layer.wanted, layer.dout_BLD, retain_graph=True)
    return out


def _second_derivative(layer: HostBlocks) -> Tensor:
    out = layer.forward()
    dx, *_ = torch.autograd.grad(out, layer.wanted, layer.dout_BLD, create_graph=True)
    return dx


SCENARIOS: dict[str, Callable[[HostBlocks], Tensor]] = {
    "eager": _eager,
    "compiled": _compiled,
    "full AC": _full_ac,
    "selective AC": _selective_ac,
    "second backward": _second_backward,
    "second derivative": _second_derivative,
}


def main() -> None:
    host_cost.leave_out_kernels()
    found: dict[str, dict[str, list[str] | str]] = {}
    for router in ("topk", "nearest"):
        layer = HostBlocks(router)
        layer.backward(layer.forward())
        found[router] = {}
        for name, forward in SCENARIOS.items():
            host_cost.ours.clear()
            try:
                layer.backward(forward(layer))
                found[router][name] = list(host_cost.ours)
            except RuntimeError as error:
                found[router][name] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
