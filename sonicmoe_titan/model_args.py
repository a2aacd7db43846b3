"""The keys of `[model]`: what a run may change about the decoder and its MoE blocks."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

Attention = Literal["auto", "sdpa", "flex", "varlen"]
Backend = Literal["auto", "hopper", "torch"]
FusedBlock = Literal["auto", "always", "never"]
MoEBlock = Literal["sonic", "stock"]
Router = Literal["topk", "token_rounding"]
Rounding = Literal["nearest", "stochastic", "score_stochastic", "balance", "up", "down"]


@dataclass(kw_only=True, slots=True)
class ModelArgs:
    """A decoder of pre-norm attention and MoE blocks; sizes count elements.

    Raises ValueError from `validate` on an illegal value, naming the key, the value and what is
    accepted.
    """

    num_layers: int
    """Decoder blocks, each with attention and an MoE block."""
    dim: int
    """Model width D (the paper's d)."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; none means num_heads (no grouped-query attention)."""
    head_dim: int | None = None
    """Width of one head; none means dim / num_heads."""
    expert_dim: int
    """Expert width F (the paper's n)."""
    num_experts: int
    """Experts E of every MoE block."""
    top_k: int
    """Experts K per token."""
    shared_expert_dim: int = 0
    """Width of the shared expert that every token passes; 0 means there is none."""
    vocab_size: int
    """Rows of the embedding and of the output projection."""
    tie_embeddings: bool = True
    """One matrix for the embedding and the output projection."""
    qk_norm: bool = True
    """RMSNorm over each head of the queries and keys."""
    rope_theta: float = 1e4
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the weights; residual output projections get it / sqrt(2 layers)."""
    attention: Attention = "auto"
    """Attention kernel: sdpa is causal over the whole sequence; flex and varlen (CUDA only) also
    mask across documents. auto is sdpa."""
    moe: MoEBlock = "sonic"
    """sonic: this project's block. stock: TorchTitan's own, to compare with; it knows neither token
    rounding nor the auxiliary losses."""
    router: Router = "topk"
    """topk: token choice. token_rounding: in training, whole tiles of tokens for each expert."""
    rounding: Rounding = "nearest"
    """How token rounding decides between the tile below and the tile above."""
    rounding_tile: int = 128
    """Rows of a tile that token rounding rounds to; the kernels' own tile is 128."""
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    """Router scores from logits."""
    softmax_order: Literal["before", "after"] = "before"
    """Softmax over all experts before the top-k, or over the K winners after it."""
    renormalize: bool = True
    """Divide the K scores of a token by their sum."""
    route_scale: float = 1.0
    """Factor on every score."""
    num_expert_groups: int | None = None
    """Groups of experts (nodes) for node-limited routing; none means no groups."""
    num_limited_groups: int | None = None
    """Groups a token may choose from."""
    aux_loss_coeff: float = 0.0
    """Coefficient of the Switch load-balancing loss; 0 turns it off."""
    z_loss_coeff: float = 0.0
    """Coefficient of the router z-loss; 0 turns it off."""
    load_balance_coeff: float | None = None
    """Step of the aux-loss-free bias on router scores; none turns it off."""
    backend: Backend = "auto"
    """Kernels of router and experts: hopper (ours) or torch; auto picks one and says why."""
    redispatch_x: bool = False
    """Under expert parallelism save only the local input and send it again in backward."""
    fused_block: FusedBlock = "auto"
    """Eager blocks as one operator where possible (docs/host_cost.md); auto: up to 2048 tokens."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads after the default."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head after the default."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    def validate(self) -> None:
        """Raise ValueError on the first illegal value or combination."""
        for key in _POSITIVE:
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"model.{key} = {value}: expected a number above 0")
        for key in _NOT_NEGATIVE:
            if getattr(self, key) < 0:
                raise ValueError(f"model.{key} = {getattr(self, key)}: expected 0 or more")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} does not divide model.dim = {self.dim}: "
                "change one of them or set model.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads = {self.kv_heads} does not divide model.num_heads = "
                f"{self.num_heads}"
            )
        if self.head_width % 2:
            raise ValueError(
                f"heads of width {self.head_width}: rotary embedding needs an even width, "
                "change model.head_dim or model.dim"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.top_k = {self.top_k} is more than model.num_experts = {self.num_experts}"
            )
        for key in ("dim", "expert_dim"):
            if getattr(self, key) % 8:
                raise ValueError(
                    f"model.{key} = {getattr(self, key)}: expected a multiple of 8 "
                    "(of 64 for the hopper backend)"
                )
        if self.score_func == "sigmoid" and self.softmax_order == "after":
            raise ValueError(
                "model.softmax_order = 'after' has no meaning with model.score_func = 'sigmoid': "
                "use 'before'"
            )
        self._validate_groups()
        self._validate_stock()

    def _validate_stock(self) -> None:
        if self.moe == "sonic":
            return
        for key, lacking in _NOT_IN_STOCK.items():
            if getattr(self, key) != lacking:
                raise ValueError(
                    f"model.{key} = {getattr(self, key)!r}: TorchTitan's own block has no such "
                    f"option; with model.moe = 'stock' set it to {lacking!r}"
                )

    def _validate_groups(self) -> None:
        groups, limited = self.num_expert_groups, self.num_limited_groups
        if (groups is None) != (limited is None):
            raise ValueError(
                f"model.num_expert_groups = {groups} and model.num_limited_groups = {limited}: "
                "set both or neither"
            )
        if groups is None or limited is None:
            return
        per_group = self.num_experts // groups
        if self.num_experts % groups or per_group < 2:
            raise ValueError(
                f"model.num_expert_groups = {groups}: expected a divisor of model.num_experts = "
                f"{self.num_experts} that leaves 2 experts or more in a group"
            )
        if limited > groups or limited * per_group < self.top_k:
            raise ValueError(
                f"model.num_limited_groups = {limited}: expected at most {groups} groups, and "
                f"enough of them ({per_group} experts each) for model.top_k = {self.top_k}"
            )


def parameter_counts(args: ModelArgs) -> tuple[int, int]:
    """(total, active per token) parameters; tied embeddings count once."""
    heads = args.head_width * (2 * args.num_heads + 2 * args.kv_heads)
    attention = args.dim * heads + (2 * args.head_width if args.qk_norm else 0)
    router = args.dim * args.num_experts
    shared = 3 * args.dim * args.shared_expert_dim
    expert = 3 * args.dim * args.expert_dim
    always = args.num_layers * (attention + 2 * args.dim + router + shared) + args.dim
    always += args.vocab_size * args.dim * (1 if args.tie_embeddings else 2)
    total = always + args.num_layers * args.num_experts * expert
    return total, always + args.num_layers * args.top_k * expert


_POSITIVE = (
    *("num_layers", "dim", "num_heads", "num_kv_heads", "head_dim", "expert_dim", "num_experts"),
    *("top_k", "vocab_size", "rope_theta", "norm_eps", "init_std", "rounding_tile"),
    *("route_scale", "num_expert_groups", "num_limited_groups", "load_balance_coeff"),
)
_NOT_IN_STOCK = {
    "router": "topk",
    "softmax_order": "before",
    "aux_loss_coeff": 0.0,
    "z_loss_coeff": 0.0,
    "backend": "auto",
    "redispatch_x": False,
    "fused_block": "auto",
}
_NOT_NEGATIVE = ("shared_expert_dim", "aux_loss_coeff", "z_loss_coeff")
assert {*_POSITIVE, *_NOT_NEGATIVE} <= {field.name for field in dataclasses.fields(ModelArgs)}
