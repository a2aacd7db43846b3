"""Bytes of activations that one decoder layer needs, every tensor named.

Legend: T tokens of one microbatch on this rank, D model width, F expert width, S width of the
shared expert, E experts, e experts of this rank, K experts per token, R routed rows (R_max their
static bound), N query heads, V key and value heads, H head width.

For one rank and one microbatch, what autograd keeps from a layer's forward until its backward.
Buffers that live for a while are in `memory_peaks`.
Source of the experts' terms: SonicMoE (arXiv 2512.14080), section 3 and Algorithms 2 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import comb
from typing import Literal

from sonicmoe_kernels.routing import r_max
from sonicmoe_kernels.tiles import TOPK_MAX_CHOSEN, TOPK_MAX_EXPERTS

from sonicmoe_titan.model_args import ModelArgs

Checkpointing = Literal["none", "selective", "full"]
Load = Literal["bound", "expected"]

INT32, INT64, FP32 = 4, 8, 4  # bytes


@dataclass(frozen=True)
class Term:
    """One tensor: the part of the layer that holds it, its name and shape, its bytes."""

    part: str
    name: str
    shape: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What the bytes of a layer depend on; sizes count elements unless they say bytes.

    Attributes:
        num_tokens: T, tokens of one microbatch on this rank (after context parallelism).
        value_bytes: bytes of an activation or weight element: 2 for bf16 and fp16.
        on_gpu: on a CPU an RMSNorm and the routing are composed of fp32 operations, and selective
            checkpointing does not know the attention kernel.
        expert_parallel: ranks that share the experts; divides E.
        load: under expert parallelism the rows that arrive are unknown: their bound, or their
            expectation under uniform routing.
    """

    args: ModelArgs
    num_tokens: int
    value_bytes: int = 2
    on_gpu: bool = True
    expert_parallel: int = 1
    load: Load = "expected"

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"{self.num_tokens} tokens: expected 1 or more per microbatch")
        if self.expert_parallel < 1 or self.args.num_experts % self.expert_parallel:
            raise ValueError(
                f"expert parallelism over {self.expert_parallel} ranks does not divide "
                f"model.num_experts = {self.args.num_experts}"
            )

    @property
    def local_experts(self) -> int:
        return self.args.num_experts // self.expert_parallel

    @property
    def routing_kernel(self) -> bool:
        """Whether one kernel routes (on a Hopper GPU), or torch's operations do."""
        args = self.args
        fits = args.num_experts <= TOPK_MAX_EXPERTS and args.top_k <= TOPK_MAX_CHOSEN
        ours = self.on_gpu and args.backend != "torch"
        return ours and fits and args.num_expert_groups is None

    @property
    def all_scores(self) -> bool:
        """Whether the routing kernel stores every expert's score."""
        return self.args.router == "token_rounding" or self.args.aux_loss_coeff > 0

    @property
    def sent_rows(self) -> int:
        """R_max of this rank's own tokens over all experts."""
        args = self.args
        rounded = args.router == "token_rounding"
        return r_max(
            self.num_tokens,
            args.top_k,
            args.num_experts,
            router=args.router,
            rounding=args.rounding if rounded else None,
            tile=args.rounding_tile if rounded else None,
        )

    @property
    def received_tokens(self) -> int:
        """Tokens that the experts of this rank see; each travels once per destination rank."""
        if self.expert_parallel == 1:
            return self.num_tokens
        total = self.num_tokens * self.expert_parallel
        if self.load == "bound":
            return total
        experts, local, top_k = self.args.num_experts, self.local_experts, self.args.top_k
        missed = comb(experts - local, top_k) / comb(experts, top_k)
        return round(total * (1 - missed))

    @property
    def rows(self) -> int:
        """Rows of H and of the plan: R_max, or what arrives under expert parallelism."""
        if self.expert_parallel == 1:
            return self.sent_rows
        if self.load == "expected":
            return self.num_tokens * self.args.top_k
        from_one_rank = min(self.sent_rows, self.num_tokens * self.local_experts)
        return self.expert_parallel * from_one_rank


def total(terms: Iterable[Term]) -> int:
    """Sum of the terms in bytes."""
    return sum(term.bytes for term in terms)


def plan_terms(shape: LayerShape) -> list[Term]:
    """The five tensors of a RoutingPlan."""
    rows, tokens, experts = shape.rows, shape.received_tokens, shape.local_experts
    return [
        Term("plan", "token_idx_R", "R", INT32 * rows),
        Term("plan", "score_R", "R", FP32 * rows),
        Term("plan", "expert_offsets", "e+1", INT32 * (experts + 1)),
        Term("plan", "token_offsets", "T+1", INT32 * (tokens + 1)),
        Term("plan", "token_rows_R", "R", INT32 * rows),
    ]


def experts_terms(shape: LayerShape) -> list[Term]:
    """What `moe_experts` saves: X, H and the plan (paper: 2TD + 4TKF bytes and the plan)."""
    args, b = shape.args, shape.value_bytes
    return [
        Term("experts", "X", "T D", b * shape.received_tokens * args.dim),
        Term("experts", "H", "R 2 F", b * shape.rows * 2 * args.expert_dim),
        *plan_terms(shape),
    ]


def dispatch_terms(shape: LayerShape) -> list[Term]:
    """What expert parallelism keeps beside the experts' own: nothing on one rank."""
    if shape.expert_parallel == 1:
        return []
    sent_tokens = shape.received_tokens  # as many, summed over the ranks
    return [
        Term("dispatch", "sent tokens", "U int64", INT64 * sent_tokens),
        Term("dispatch", "source of each received score", "R int32", INT32 * shape.rows),
    ]


def norm_terms(shape: LayerShape, part: str, *, rows: int, width: int, source: str) -> list[Term]:
    """RMSNorm over `rows` vectors: one fused kernel keeps its input and 1 / rms, a CPU more."""
    if shape.on_gpu:
        kept = [Term(part, source, "", shape.value_bytes * rows * width)]
    else:
        kept = [
            Term(part, f"{source} in fp32", "", FP32 * rows * width),
            Term(part, "normalised in fp32", "", FP32 * rows * width),
        ]
    return [*kept, Term(part, "1 / rms", "", FP32 * rows)]


def attention_terms(shape: LayerShape) -> list[Term]:
    """Attention with its norm; flash, flex and varlen kernels keep the same tensors."""
    args, b, T = shape.args, shape.value_bytes, shape.num_tokens
    N, V, H = args.num_heads, args.kv_heads, args.head_width
    terms = norm_terms(shape, "attention norm", rows=T, width=args.dim, source="layer input")
    terms.append(Term("attention", "normed input", "T D", b * T * args.dim))
    if args.qk_norm:
        terms += norm_terms(shape, "qk norm", rows=T * N, width=H, source="q")
        terms += norm_terms(shape, "qk norm", rows=T * V, width=H, source="k")
    return [
        *terms,
        Term("attention", "rotary cos, sin", "T 2 H", FP32 * T * 2 * H),
        Term("attention", "q rotated", "T N H", b * T * N * H),
        Term("attention", "k rotated", "T V H", b * T * V * H),
        Term("attention", "v", "T V H", b * T * V * H),
        Term("attention", "output", "T N H", b * T * N * H),
        Term("attention", "log-sum-exp", "T N", FP32 * T * N),
    ]


def shared_expert_terms(shape: LayerShape) -> list[Term]:
    """TorchTitan's dense SwiGLU on the same X: both halves, silu of the gate, their product."""
    width = shape.args.shared_expert_dim
    if not width:
        return []
    size = shape.value_bytes * shape.num_tokens * width
    names = ("gate", "silu(gate)", "up", "silu(gate) up")
    return [Term("shared expert", name, "T S", size) for name in names]


def router_terms(shape: LayerShape) -> list[Term]:
    """Scores, choice and the way from scores to the plan's rows; X and the gate are not in here."""
    args, T = shape.args, shape.num_tokens
    E, K, R = args.num_experts, args.top_k, shape.sent_rows
    terms = [Term("router", "chosen experts", "T K int64", INT64 * T * K)]
    if shape.routing_kernel:
        if _softmax_over_chosen(args):
            terms.append(Term("router", "weights of the chosen", "T K", FP32 * T * K))
        if _routing_keeps_logits(shape):
            terms.append(Term("router", "logits", "T E", FP32 * T * E))
    elif args.softmax_order == "after":
        terms.append(Term("router", "logits", "T E", FP32 * T * E))
        terms.append(Term("router", "softmax of the chosen", "T K", FP32 * T * K))
    else:
        terms.append(Term("router", "scores", "T E", FP32 * T * E))
        if args.renormalize:
            terms.append(Term("router", "chosen scores", "T K", FP32 * T * K))
            terms.append(Term("router", "their sum", "T", FP32 * T))
    terms.append(Term("router", "source of each row's score", "R int32", INT32 * R))
    return [*terms, *_auxiliary_loss_terms(shape)]


def _softmax_over_chosen(args: ModelArgs) -> bool:
    """As `sonicmoe_kernels.tiles.TopKOptions.over_chosen`."""
    renormalized = args.renormalize and args.load_balance_coeff is None
    return args.score_func == "softmax" and (args.softmax_order == "after" or renormalized)


def _routing_keeps_logits(shape: LayerShape) -> bool:
    if shape.routing_kernel:
        return shape.all_scores or not _softmax_over_chosen(shape.args)
    return shape.args.softmax_order == "after"


def _auxiliary_loss_terms(shape: LayerShape) -> list[Term]:
    """What the auxiliary losses keep beside the scores that the choice keeps anyway."""
    args, T, E = shape.args, shape.num_tokens, shape.args.num_experts
    after = args.softmax_order == "after"
    terms = []
    if args.aux_loss_coeff:
        if args.score_func == "sigmoid":
            terms.append(Term("router losses", "scores", "T E", FP32 * T * E))
            terms.append(Term("router losses", "their sum", "T", FP32 * T))
        elif args.num_expert_groups is not None or (after and not shape.routing_kernel):
            terms.append(Term("router losses", "softmax over all experts", "T E", FP32 * T * E))
        terms.append(Term("router losses", "fraction and mean probability", "2 E", 2 * FP32 * E))
    if args.z_loss_coeff:
        if not _routing_keeps_logits(shape):
            terms.append(Term("router losses", "logits", "T E", FP32 * T * E))
        terms.append(Term("router losses", "log-sum-exp", "T", FP32 * T))
    return terms


def moe_terms(shape: LayerShape) -> list[Term]:
    """Everything that the MoE block saves."""
    args, b, T = shape.args, shape.value_bytes, shape.num_tokens
    experts = experts_terms(shape)
    if shape.expert_parallel > 1:  # the experts' X came from other ranks; the gate has its own
        if args.redispatch_x:
            experts = [term for term in experts if term.name != "X"]
        experts.append(Term("router", "X of this rank", "T D", b * T * args.dim))
    return [
        *experts,
        *dispatch_terms(shape),
        *router_terms(shape),
        *shared_expert_terms(shape),
    ]


def _repeated_choice_terms(shape: LayerShape) -> list[Term]:
    """What selective checkpointing keeps so that a repeated forward chooses alike."""
    args, T, chosen = shape.args, shape.num_tokens, shape.num_tokens * shape.args.top_k
    terms = [Term("router", "chosen experts", "T K int64", INT64 * chosen)]
    if not shape.routing_kernel:
        return [*terms, Term("router", "their keys in the top-k", "T K int64", INT64 * chosen)]
    terms.append(Term("router", "weights of the chosen", "T K", FP32 * chosen))
    if shape.all_scores:
        terms.append(Term("router", "all scores", "T E", FP32 * T * args.num_experts))
    return terms


def layer_terms(shape: LayerShape, checkpointing: Checkpointing = "none") -> list[Term]:
    """What one decoder layer holds between its forward and its backward.

    "selective" keeps, beside the layer's input, the outputs of the operations that are dear to
    repeat: of the matrix products every second one (and never the gate), attention, the top-k, and
    the experts' O and H (`sonicmoe_kernels.ops.SAVE_OPS`).
    """
    args, b, T = shape.args, shape.value_bytes, shape.num_tokens
    N, V, H = args.num_heads, args.kv_heads, args.head_width
    if checkpointing == "none":
        ffn_norm = norm_terms(shape, "ffn norm", rows=T, width=args.dim, source="its input")
        return [*attention_terms(shape), *ffn_norm, *moe_terms(shape)]
    layer_input = Term("checkpoint", "layer input", "T D", b * T * args.dim)
    if checkpointing == "full":
        return [layer_input]
    terms = [
        layer_input,
        Term("attention", "q k v projected", "T (N+2V) H", b * T * (N + 2 * V) * H),
    ]
    if shape.on_gpu:
        terms.append(Term("attention", "output", "T N H", b * T * N * H))
        terms.append(Term("attention", "log-sum-exp", "T N", FP32 * T * N))
    if shape.expert_parallel > 1:  # what each all-to-all returned
        received = b * shape.received_tokens * args.dim
        pairs = (INT64 + FP32) * shape.rows
        terms.append(Term("dispatch", "pairs and scores received", "R int64, R", pairs))
        terms.append(Term("dispatch", "X received", "T D", received))
        terms.append(Term("dispatch", "output sent back", "T D", received))
    terms += [
        *_repeated_choice_terms(shape),
        Term("experts", "O", "T D", b * shape.received_tokens * args.dim),
        Term("experts", "H", "R 2 F", b * shape.rows * 2 * args.expert_dim),
    ]
    if args.shared_expert_dim:
        # the products in order: qkv kept, output repeated, gate kept, up repeated, down kept
        terms.append(
            Term("shared expert", "gate", "T S", b * T * args.shared_expert_dim),
        )
        terms.append(Term("shared expert", "output", "T D", b * T * args.dim))
    return terms
