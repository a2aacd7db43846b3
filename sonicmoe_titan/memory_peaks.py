"""Bytes that a layer's forward and backward need for a while beside what is kept between them.

Legend: T tokens, D model width, F expert width, e experts of this rank, R routed rows.

- forward peak: the most that is live during the forward beyond what is kept at its end;
- backward peak: the most that the backward adds to what is kept, weight gradients included.
Both are those of the hopper backend, and tested against the allocator of a GPU.
"""

from __future__ import annotations

from sonicmoe_titan.memory_model import (
    FP32,
    Checkpointing,
    LayerShape,
    Term,
    layer_terms,
    total,
)


def _buffers(shape: LayerShape) -> dict[str, int]:
    """Bytes of what the experts' kernels hold for a while."""
    args, b = shape.args, shape.value_bytes
    D, F, R, T = args.dim, args.expert_dim, shape.rows, shape.received_tokens
    weight = b * shape.local_experts * D * F
    return {
        "A": b * R * F,
        "Y": b * R * D,
        "O": b * T * D,
        "dO": b * T * D,
        "A'": b * R * F,
        "dS": FP32 * R,
        "dX~": b * R * D,
        "dX": b * T * D,
        "dW2": weight,
        "dW1 dW3": 2 * weight,
    }


# What is live beside the saved tensors while each kernel runs, as `hopper_experts` orders them. dH
# overwrites H; autograd holds dO throughout.
FORWARD_STAGES: dict[str, tuple[str, ...]] = {
    "up": ("A",),
    "down": ("A", "Y"),
    "aggregate O": ("Y", "O"),
}
BACKWARD_STAGES: dict[str, tuple[str, ...]] = {
    "dH": ("dO", "dS", "A'"),
    "dW2": ("dO", "dS", "A'", "dW2"),
    "dX~": ("dO", "dS", "dW2", "dX~"),
    "aggregate dX": ("dO", "dS", "dW2", "dX~", "dX"),
    "dW1 dW3": ("dO", "dS", "dW2", "dX", "dW1 dW3"),
}


def peak(shape: LayerShape, stages: dict[str, tuple[str, ...]]) -> tuple[str, list[Term]]:
    """The stage of the experts' kernels with the largest buffers, and those buffers."""
    sizes = _buffers(shape)
    stage = max(stages, key=lambda name: sum(sizes[buffer] for buffer in stages[name]))
    return stage, [Term("transient", name, "", sizes[name]) for name in stages[stage]]


def backward_peak(shape: LayerShape, checkpointing: Checkpointing = "none") -> int:
    """Bytes that a layer's backward adds to what is saved: buffers, and what it recomputes."""
    _, buffers = peak(shape, BACKWARD_STAGES)
    added = total(buffers)
    if checkpointing != "none":
        added += max(0, total(layer_terms(shape)) - total(layer_terms(shape, checkpointing)))
    return added


def forward_peak(shape: LayerShape) -> int:
    """Bytes that a layer's forward needs for a while beside what it saves."""
    return total(peak(shape, FORWARD_STAGES)[1])
