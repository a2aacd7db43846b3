"""The decoder: TorchTitan's Qwen3 blocks with an MoE in every layer, sized by ModelArgs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import (
    FlexAttention,
    ScaledDotProductAttention,
    VarlenAttention,
)
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module

from sonicmoe_titan.conversion import to_sonic
from sonicmoe_titan.hf_adapter import SonicStateDictAdapter
from sonicmoe_titan.model_args import ModelArgs
from sonicmoe_titan.parallelize import parallelize_decoder

_ATTENTION: dict[str, type[Module]] = {
    "auto": ScaledDotProductAttention,  # the paper's data is packed without document masks
    "sdpa": ScaledDotProductAttention,
    "flex": FlexAttention,
    "varlen": VarlenAttention,
}


def build_model_spec(args: ModelArgs, *, seq_len: int, flavor: str = "decoder") -> ModelSpec:
    """What TorchTitan's trainer needs to build, shard and save the decoder.

    Args:
        args: validated here (ValueError on an illegal value).
        seq_len: longest sequence in tokens; sizes the rotary cache.
        flavor: the name that logs show.
    """
    args.validate()
    return ModelSpec(
        name="sonicmoe",
        flavor=flavor,
        model=decoder_config(args, seq_len=seq_len),
        parallelize_fn=parallelize_decoder,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=register_moe_load_balancing_hook,
        state_dict_adapter=SonicStateDictAdapter,
    )


def with_sequence_positions(
    input_dict: dict[str, Tensor], config: Decoder.Config
) -> dict[str, Tensor]:
    """The loader's batch for this attention: positions count over the sequence without a mask.

    Loaders number the tokens of every document from 0, which is right where attention masks other
    documents. Causal attention over the whole sequence would see two tokens at one position.
    """
    attention = config.layers[0].attention.inner_attention
    if not isinstance(attention, ScaledDotProductAttention.Config) or "positions" not in input_dict:
        return input_dict
    positions_BL = input_dict["positions"]
    sequence_L = torch.arange(positions_BL.shape[1], device=positions_BL.device)
    return {**input_dict, "positions": sequence_L.expand_as(positions_BL).contiguous()}


def decoder_config(args: ModelArgs, *, seq_len: int) -> Qwen3Model.Config:
    """The decoder's config tree; with tied embeddings the output projection owns the matrix."""
    tied = args.tie_embeddings
    return Qwen3Model.Config(
        dim=args.dim,
        vocab_size=args.vocab_size,
        enable_weight_tying=tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=args.vocab_size,
            embedding_dim=args.dim,
            param_init={"weight": skip_param_init} if tied else _normal(args.init_std),
        ),
        norm=_norm(args, args.dim),
        lm_head=Linear.Config(
            in_features=args.dim, out_features=args.vocab_size, param_init=_normal(args.init_std)
        ),
        layers=[_block_config(args, seq_len=seq_len) for _ in range(args.num_layers)],
    )


def _block_config(args: ModelArgs, *, seq_len: int) -> Qwen3TransformerBlock.Config:
    return Qwen3TransformerBlock.Config(
        attention_norm=_norm(args, args.dim),
        ffn_norm=_norm(args, args.dim),
        attention=make_gqa_config(
            dim=args.dim,
            n_heads=args.num_heads,
            n_kv_heads=args.kv_heads,
            head_dim=args.head_width,
            fuse_qkv=True,
            wqkv_param_init=_normal(args.init_std),
            wo_param_init=_normal(_residual_std(args)),
            inner_attention=_ATTENTION[args.attention].Config(),
            rope=CosSinRoPE.Config(dim=args.head_width, max_seq_len=seq_len, theta=args.rope_theta),
            qk_norm=_norm(args, args.head_width) if args.qk_norm else None,
        ),
        moe=_moe_config(args),
    )


def _moe_config(args: ModelArgs) -> MoE.Config:
    init, residual_init = _init(args.init_std), _init(_residual_std(args))
    shared = None
    if args.shared_expert_dim:
        shared = make_ffn_config(
            dim=args.dim,
            hidden_dim=args.shared_expert_dim,
            w1_param_init=_normal(args.init_std),
            w2w3_param_init=_normal(args.init_std),
        )
        shared.w2.param_init = _normal(_residual_std(args))
    stock = make_moe_config(
        num_experts=args.num_experts,
        load_balance_coeff=args.load_balance_coeff,
        shared_experts=shared,
        router=make_router_config(
            dim=args.dim,
            num_experts=args.num_experts,
            gate_param_init=_normal(args.init_std),
            top_k=args.top_k,
            score_func=args.score_func,
            route_norm=args.renormalize,
            route_scale=args.route_scale,
            num_expert_groups=args.num_expert_groups,
            num_limited_groups=args.num_limited_groups,
        ),
        routed_experts=make_routed_experts_config(
            dim=args.dim,
            hidden_dim=args.expert_dim,
            num_experts=args.num_experts,
            top_k=args.top_k,
            param_init={"w1_EFD": init, "w2_EDF": residual_init, "w3_EFD": init},
            comm_backend="standard",
        ),
    )
    if args.moe == "stock":
        return stock
    return to_sonic(
        stock,
        router=args.router,
        rounding=args.rounding,
        rounding_tile=args.rounding_tile,
        softmax_order=args.softmax_order,
        aux_loss_coeff=args.aux_loss_coeff,
        z_loss_coeff=args.z_loss_coeff,
        backend=args.backend,
        redispatch_x=args.redispatch_x,
        fused_block=args.fused_block,
    )


def _norm(args: ModelArgs, width: int) -> RMSNorm.Config:
    return RMSNorm.Config(
        normalized_shape=width, eps=args.norm_eps, param_init={"weight": nn.init.ones_}
    )


def _residual_std(args: ModelArgs) -> float:
    """Two residual branches a layer: their sum keeps the variance of one."""
    return args.init_std / (2 * args.num_layers) ** 0.5


def _init(std: float) -> Callable[..., Any]:
    return partial(nn.init.normal_, std=std)


def _normal(std: float) -> dict[str, Callable[..., Any]]:
    return {"weight": _init(std)}
