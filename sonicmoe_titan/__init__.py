"""SonicMoE for TorchTitan: `--module sonicmoe_titan` and `python -m sonicmoe_titan.train`."""
