"""What other implementations keep for the backward of the same experts.

Legend: T tokens, D model width, F expert width, E experts, R = T K routed rows, b bytes per value.

X (T D), the gathered rows X_g (R D), H (R 2F), A (R F) and Y (R D) are the paper's tensors. Weights
are not counted, X is counted for everyone: the router keeps it anyway. Sources, in this order of
trust: measured on an H100 by us, read in the peer's code, or the peak memory per layer that Figure
13 of SonicMoE (arXiv 2512.14080, v1) plots. Bars of that figure, less the layer's weights (6 E D F
bytes) and where so noted the output O, give these sums within 0.06 GiB if nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from sonicmoe_titan.memory_model import INT64, LayerShape, experts_terms, total

MEGABLOCKS_TILE = 128  # rows; its block-sparse format pads every expert to whole blocks


@dataclass(frozen=True)
class Peer:
    """An implementation, the bytes it keeps for one MoE layer, and where we know it from."""

    name: str
    bytes: int
    formula: str
    source: str


def peers(shape: LayerShape) -> list[Peer]:
    """Every implementation for one shape at plain top-k routing, ours (as configured) first."""
    args, b = shape.args, shape.value_bytes
    T, R, D, F = shape.num_tokens, shape.num_tokens * args.top_k, args.dim, args.expert_dim
    X, XG, H, A, Y = b * T * D, b * R * D, b * R * 2 * F, b * R * F, b * R * D
    # half a block per expert on average; an expert without rows still takes none
    padded = R + min(R, shape.local_experts) * MEGABLOCKS_TILE // 2
    return [
        Peer(
            "SonicMoE",
            total(experts_terms(shape)),
            "X + H + plan",
            "tested to the byte against autograd",
        ),
        Peer(
            "MoMoE",
            X + H + Y,
            "X + H + Y",
            "Figure 13; saving 0% instead it keeps X alone and repeats the forward "
            "(measured 74 MiB at 7B)",
        ),
        Peer(
            "DeepGEMM",
            XG + H,
            "X_g + H",
            "Figure 13 (with O), bars up to 0.15 GiB higher at K = 16",
        ),
        Peer(
            "ScatterMoE",
            X + H + A + Y,
            "X + H + A + Y",
            "Figure 13; its package keeps silu(gate) (R F) too: measured 1035 MiB at 7B, "
            "where this says 936",
        ),
        Peer(
            "MegaBlocks",
            b * padded * (2 * D + 2 * F),
            "X_g + H + Y, rows padded to 128",
            "Figure 13; its bar for D 4096, F 1024, E 128 is 1 GiB higher",
        ),
        Peer(
            "Megatron-LM",
            X + XG + H + A + Y,
            "X + X_g + H + A + Y",
            "Figure 13; its bar for D 4096, F 256, E 256 is 2 GiB higher",
        ),
        Peer(
            "TorchTitan 0.3",
            X + XG + 2 * H + 2 * Y + R * (4 + 2 * INT64),
            "X + X_g + gate, silu(gate), up, A + Y in fp32 + indices",
            "its code, tested against autograd; measured 2188 MiB at 7B, where this says 2188",
        ),
    ]
