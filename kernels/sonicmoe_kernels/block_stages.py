"""The fused block's stages: what each is compiled for, and where its buffers' parts lie.

Legend: T tokens, D model width, F expert width, E experts, K experts per token, R_max bound on
routed rows, B blocks of 256 tokens.

A stage launches several kernels from compiled code. A pass has one stage; backward has two for
many tokens, so that its buffer is gone before the greatest gradients are made. The small tensors
between kernels are parts of buffers of 32-bit words, one kept for backward and one of each pass.
Both the host, which allocates, and the compiled code, which cuts, ask the same functions here;
their numbers may be Python's or the compiler's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sonicmoe_kernels.activations import get_activation
from sonicmoe_kernels.tiles import (
    BLOCK_WORDS,
    TILE_K,
    TOKEN_BLOCK,
    TopKOptions,
    count_columns,
    why_illegal_routing,
    why_illegal_topk,
)

__all__ = [
    "STAGES",
    "BlockLayer",
    "BlockStage",
    "Stage",
    "gradient_parts",
    "kept_parts",
    "scratch_parts",
    "why_illegal_block",
    "words",
]

Stage = Literal["forward", "gradients", "input_gradient", "weight_gradients"]
PART_WORDS = 4  # parts begin at multiples of 16 bytes: what kernels load at once
ID_WORDS = 2  # of an expert's number, int64
HALVES_IN_WORD = 2  # bf16 numbers
GATE_SPANS = 3  # 0, T, 2T: an expert of T rows, or of 2T


@dataclass(frozen=True)
class BlockLayer:
    """What the kernels of one layer are compiled for. Never T or R.

    routing: the router's options; dtype there is that of the logits, float32. rounding: the variant
    of token rounding, None for token choice. Tokens, weights and gradients are bf16.
    """

    routing: TopKOptions
    rounding: str | None
    d: int
    f: int
    activation: str = "swiglu"

    @property
    def rows_per_token(self) -> int | None:
        """K, or None where tokens own different numbers of rows."""
        return self.routing.top_k if self.rounding is None else None


@dataclass(frozen=True)
class BlockStage:
    """One compiled object that launches the kernels of a stage."""

    builder: ClassVar[str] = "sonicmoe_kernels.cute.build_block:build"

    stage: Stage
    layer: BlockLayer

    @property
    def kernel(self) -> str:
        return f"block_{self.stage}"

    @property
    def launches(self) -> tuple[str, ...]:
        """The kernels, in order."""
        input_gradient = ("d_hidden", "d_weight2", "topk_backward", "d_input")
        match self.stage:
            case "forward":
                balance = ("balance",) if self.layer.rounding == "balance" else ()
                rounding = () if self.layer.rounding is None else (*balance, "token_rounding")
                plan = ("membership", *rounding, "plan_rows")
                return ("topk", *plan, "up", "down", "aggregate")
            case "gradients":  # the first "d_weight13" is the gate's
                return (*input_gradient, "d_weight13", "d_input", "aggregate", "d_weight13")
            case "input_gradient":
                return (*input_gradient, "d_input", "aggregate")
            case "weight_gradients":
                return ("d_weight13",)


STAGES: tuple[Stage, ...] = ("forward", "gradients", "input_gradient", "weight_gradients")


def why_illegal_block(layer: BlockLayer) -> str | None:
    """None if the block can be fused for this layer, or the reason."""
    E, K = layer.routing.num_experts, layer.routing.top_k
    if reason := why_illegal_topk(layer.routing) or why_illegal_routing(E, K):
        return reason
    if layer.d % TILE_K or layer.f % TILE_K or E % TILE_K:
        sizes = f"D={layer.d}, F={layer.f} and E={E}"
        return f"{sizes} must be multiples of {TILE_K} (in backward the gate is an E wide expert)"
    return None


def kept_parts(layer: BlockLayer, tokens: Any, rows: Any) -> dict[str, Any]:
    """Words of each part of the buffer kept for backward, in their order: H, plan and choice.

    The K weights are kept where a softmax over the chosen is differentiated; else the logits are,
    a tensor of their own.
    """
    E, K = layer.routing.num_experts, layer.routing.top_k
    parts = {
        "h": halves_of(layer) * layer.f // HALVES_IN_WORD * rows,
        "ids": ID_WORDS * K * tokens,
        "token_idx": rows,
        "score": rows,
        "token_rows": rows,
        "source": rows,
        "expert_offsets": E + 1,
        "token_offsets": tokens + 1,
    }
    if layer.routing.over_chosen:
        parts["weights"] = K * tokens
    return parts


def scratch_parts(layer: BlockLayer, tokens: Any, rows: Any) -> dict[str, Any]:
    """Words of each part of the forward pass's own buffer; "a" is A and "y" is Y, in 16 bits."""
    E, K = layer.routing.num_experts, layer.routing.top_k
    columns = count_columns(E)
    blocks = (tokens + TOKEN_BLOCK - 1) // TOKEN_BLOCK
    parts = {
        "bits": E * BLOCK_WORDS * blocks,
        "counts": columns * blocks,
        "a": layer.f // HALVES_IN_WORD * rows,
        "y": layer.d // HALVES_IN_WORD * rows,
    }
    if not layer.routing.over_chosen:
        parts["weights"] = K * tokens
    if layer.rounding is not None:
        parts["scores"] = E * tokens
        parts["addable"] = columns * blocks
        parts["keys"] = E * TOKEN_BLOCK * blocks
        parts["chosen"] = E
    if layer.rounding == "balance":
        parts["go_up"] = E
    return parts


def gradient_parts(layer: BlockLayer, tokens: Any, rows: Any, score_parts: int) -> dict[str, Any]:
    """Words of each part of the backward pass's own buffer.

    The logits' gradient in two bf16 halves (T, 2, E), first; the gate's product seen as an
    expert's: the tokens of its 2T rows, and where these start and end; dS in parts; and A', whose
    place dX~ takes when it is no longer needed.
    """
    return {
        "halves": 2 * layer.routing.num_experts // HALVES_IN_WORD * tokens,
        "gate_rows": 2 * tokens,
        "gate_spans": GATE_SPANS,
        "dscore": score_parts * rows,
        "rows": max(layer.f, layer.d) // HALVES_IN_WORD * rows,
    }


def halves_of(layer: BlockLayer) -> int:
    """2 where the activation is gated."""
    return get_activation(layer.activation).halves


def words(parts: dict[str, Any]) -> Any:
    """Length of a buffer of these parts."""
    return sum(whole(part) for part in parts.values())


def whole(part: Any) -> Any:
    """A part's length with the words that nobody uses behind it."""
    return (part + PART_WORDS - 1) // PART_WORDS * PART_WORDS
