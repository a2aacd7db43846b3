"""SonicMoE for TorchTitan: `--module sonicmoe_titan` and `python -m sonicmoe_titan.train`."""

from sonicmoe_titan.cpu import prepare_cpu

prepare_cpu()
