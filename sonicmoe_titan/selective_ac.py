"""Selective activation checkpointing that knows our operators."""

from dataclasses import dataclass

import torch
from sonicmoe_kernels import ops, routing_ops
from torchtitan.distributed.activation_checkpoint import SelectiveAC


class SonicSelectiveAC(SelectiveAC):
    """TorchTitan's policy; the experts and our top-k are kept too, and no collective runs twice.

    What is kept beside the plain block's own: the experts' output and, under expert parallelism,
    the rows that came back, because the policy keeps whole results of an operator.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        """Stock's, the experts, the router's choice, the load-balancing loss's all-reduce."""
        all_reduce = torch.ops._c10d_functional.all_reduce.default
        return super().get_save_ops() | {*ops.SAVE_OPS, *routing_ops.SAVE_OPS, all_reduce}
