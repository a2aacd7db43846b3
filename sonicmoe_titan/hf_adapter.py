"""Our decoder as a `transformers` model: Qwen3MoE with QK-norm, Mixtral without.

Both are the same block otherwise: RMSNorm, grouped-query attention with rotary embeddings, SwiGLU
experts under a softmax router. They differ from ours in what they cannot express, and that is
refused; token rounding and auxiliary losses act in training only and need no place.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.models.common import CosSinRoPE
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter

Architecture = Literal["qwen3_moe", "mixtral"]

# Qwen3MoE's name of a part of the MoE block, and Mixtral's.
MIXTRAL_NAMES = (
    (r"\.mlp\.gate\.weight$", ".block_sparse_moe.gate.weight"),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.weight$", r".block_sparse_moe.experts.\1.w1.weight"),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.weight$", r".block_sparse_moe.experts.\1.w3.weight"),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.weight$", r".block_sparse_moe.experts.\1.w2.weight"),
)
QWEN3_NAMES = (
    (r"\.block_sparse_moe\.gate\.weight$", ".mlp.gate.weight"),
    (r"\.block_sparse_moe\.experts\.(\d+)\.w1\.weight$", r".mlp.experts.\1.gate_proj.weight"),
    (r"\.block_sparse_moe\.experts\.(\d+)\.w3\.weight$", r".mlp.experts.\1.up_proj.weight"),
    (r"\.block_sparse_moe\.experts\.(\d+)\.w2\.weight$", r".mlp.experts.\1.down_proj.weight"),
)


class SonicStateDictAdapter(Qwen3StateDictAdapter):
    """Converts state dicts bit for bit and writes the config.json that goes with them.

    Every conversion raises ValueError for a model, or an entry, that the target has no place for.
    """

    model_config: Qwen3Model.Config  # pyrefly: ignore [bad-override-mutable-attribute]

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return `state_dict` under the target's names, the experts' weights one by one."""
        architecture = self.architecture()
        known = {name for name in self.from_hf_map.values() if name is not None}
        for name in state_dict:
            if re.sub(r"\d+", "{}", name, count=1) not in known and name not in known:
                raise ValueError(f"{name} has no place in a {architecture} checkpoint")
        converted = super().to_hf(state_dict)
        return _rename(converted, MIXTRAL_NAMES) if architecture == "mixtral" else converted

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the native state dict of `hf_state_dict`."""
        architecture = self.architecture()
        if architecture == "mixtral":
            hf_state_dict = _rename(hf_state_dict, QWEN3_NAMES)
        wanted: set[str] = set()
        for name in hf_state_dict:
            numbers = re.findall(r"\.(\d+)\.", name)
            native = self.from_hf_map.get(re.sub(r"\.\d+\.", ".{}.", name), "")
            if native == "":
                raise ValueError(f"{name} of a {architecture} checkpoint has no place here")
            if native is not None:
                wanted.add(native.format(*numbers))
        state_dict = super().from_hf(dict(hf_state_dict))
        if lost := sorted(wanted - state_dict.keys()):
            raise ValueError(f"the {architecture} checkpoint has only some experts of {lost[0]}")
        return state_dict

    def architecture(self) -> Architecture:
        """Return what the model is to `transformers`; ValueError if it is nothing there."""
        if problems := _problems(self.model_config):
            raise ValueError(
                "the model cannot become a transformers checkpoint, which has no place for "
                + "; ".join(problems)
                + ": save in the native format (checkpoint.last_save_in_hf = false)"
            )
        return _architecture(self.model_config)

    def hf_config(self) -> dict[str, Any]:
        """Return the content of the target's config.json."""
        architecture = self.architecture()
        model = self.model_config
        layer = model.layers[0]
        attention, router = layer.attention, layer.moe.router
        experts = layer.moe.routed_experts.inner_experts
        config = {
            "model_type": architecture,
            "hidden_act": "silu",
            "hidden_size": model.dim,
            "vocab_size": model.vocab_size,
            "num_hidden_layers": len(model.layers),
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
            "head_dim": _head_dim(attention),
            "max_position_embeddings": attention.rope.max_seq_len,
            "rms_norm_eps": model.norm.eps,
            "rope_theta": attention.rope.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope.theta},
            "tie_word_embeddings": model.enable_weight_tying,
            "num_experts_per_tok": router.top_k,
            "intermediate_size": experts.hidden_dim,
        }
        if architecture == "mixtral":
            return config | {
                "architectures": ["MixtralForCausalLM"],
                "num_local_experts": layer.moe.num_experts,
                "sliding_window": None,
            }
        return config | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": layer.moe.num_experts,
            "moe_intermediate_size": experts.hidden_dim,
            "norm_topk_prob": _renormalizes(router),
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def write_config(self, folder: Path, *, tokenizer: HuggingFaceTokenizer | None) -> None:
        """Write config.json into `folder`, and the tokenizer's files if there is one."""
        config = self.hf_config()
        if tokenizer is not None:
            config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
            special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
            description = {**special, "tokenizer_class": "PreTrainedTokenizerFast"}
            (folder / "tokenizer_config.json").write_text(json.dumps(description, indent=2))
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def _rename(state_dict: dict[str, Any], names: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _architecture(model: Qwen3Model.Config) -> Architecture:
    return "mixtral" if model.layers[0].attention.qk_norm is None else "qwen3_moe"


def _head_dim(attention: GQAttention.Config) -> int:
    return attention.head_dim or attention.dim // attention.n_heads


def _renormalizes(router: Any) -> bool:
    """Whether a token's scores sum to 1: softmax over the winners alone is the same numbers."""
    return router.route_norm or getattr(router, "softmax_order", "before") == "after"


def _problems(model: Qwen3Model.Config) -> list[str]:
    """Return everything in `model` that `transformers` cannot express, in words."""
    if any(layer.moe is None for layer in model.layers):
        return ["layers without experts"]
    first = model.layers[0]
    facts = [_layer_facts(layer) for layer in model.layers]
    router, rope = first.moe.router, first.attention.rope
    norms = (model.norm, first.attention_norm, first.ffn_norm, first.attention.qk_norm)
    checks = {
        "layers of different shapes": any(fact != facts[0] for fact in facts),
        "shared experts (model.shared_expert_dim)": first.moe.shared_experts is not None,
        "expert_bias_E (model.load_balance_coeff)": first.moe.load_balance_coeff is not None,
        f"{router.score_func} scores (model.score_func)": router.score_func != "softmax",
        "node-limited routing (model.num_expert_groups)": router.num_expert_groups is not None,
        "a route scale (model.route_scale)": router.route_scale != 1,
        "a router bias": router.gate.bias,
        "scores that do not sum to 1, in Mixtral (model.renormalize; or set model.qk_norm)": (
            _architecture(model) == "mixtral" and not _renormalizes(router)
        ),
        "several norm epsilons": len({norm.eps for norm in norms if norm is not None}) > 1,
        "this rotary embedding": not isinstance(rope, CosSinRoPE.Config) or rope.scaling != "none",
    }
    return [words for words, present in checks.items() if present]


def _layer_facts(layer: Any) -> tuple[Any, ...]:
    """Return what `transformers` keeps once for all layers."""
    attention, moe, router = layer.attention, layer.moe, layer.moe.router
    return (
        *(attention.n_heads, attention.n_kv_heads, _head_dim(attention), attention.rope.theta),
        *(attention.qk_norm is None, moe.num_experts, moe.shared_experts is None),
        *(moe.load_balance_coeff, moe.routed_experts.inner_experts.hidden_dim, router.top_k),
        *(router.score_func, router.route_norm, router.route_scale, router.num_expert_groups),
    )
