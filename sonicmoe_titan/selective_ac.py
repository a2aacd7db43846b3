"""Selective activation checkpointing that knows our operators."""

from dataclasses import dataclass

import torch
from sonicmoe_kernels.ops import SAVE_OPS
from torchtitan.distributed.activation_checkpoint import SelectiveAC


class SonicSelectiveAC(SelectiveAC):
    """TorchTitan's policy; the experts are kept too, and no collective of the block runs twice.

    What is kept beside the plain block's own: the experts' output and, under expert parallelism,
    the rows that came back, because the policy keeps whole results of an operator.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        """Stock's operators, the experts, and the all-reduce of the load-balancing loss."""
        all_reduce = torch.ops._c10d_functional.all_reduce.default
        return super().get_save_ops() | set(SAVE_OPS) | {all_reduce}
