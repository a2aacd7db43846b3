"""Our decoder against the real models of transformers, in float32 on the CPU."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchtitan.protocols.module import Module

import sonicmoe_titan  # prepares TorchTitan for the CPU  # noqa: F401
from sonicmoe_titan.hf_adapter import SonicStateDictAdapter
from sonicmoe_titan.model import decoder_config
from sonicmoe_titan.model_args import ModelArgs
from tests.titan.tiny import TOKENIZER

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

ARGS = ModelArgs(
    num_layers=3,
    dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    expert_dim=32,
    num_experts=16,
    top_k=4,
    vocab_size=512,
    init_std=0.1,
    rope_theta=5e5,
    norm_eps=1e-6,
)
SEQ_LEN = 48

# Every way of routing that transformers can express, with and without QK-norm, and who it becomes.
EXPRESSIBLE = {
    "qwen3_moe": {},
    "qwen3_moe, tied off": {"tie_embeddings": False},
    "qwen3_moe, raw scores": {"renormalize": False},
    "qwen3_moe, softmax after": {"softmax_order": "after", "renormalize": False},
    "qwen3_moe, token rounding": {"router": "token_rounding", "rounding_tile": 16},
    "qwen3_moe, losses": {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
    "mixtral": {"qk_norm": False, "norm_eps": 1e-5},
    "mixtral, tied off": {"qk_norm": False, "tie_embeddings": False},
    "mixtral, softmax after": {"qk_norm": False, "softmax_order": "after", "renormalize": False},
}
REFUSED = {
    "shared experts": {"shared_expert_dim": 64},
    "expert_bias_E": {"load_balance_coeff": 1e-3},
    "sigmoid scores": {"score_func": "sigmoid"},
    "route scale": {"route_scale": 2.5},
    "node-limited routing": {"num_expert_groups": 4, "num_limited_groups": 2},
    "do not sum to 1": {"qk_norm": False, "renormalize": False},
}


def build(**changes: Any) -> tuple[Module, SonicStateDictAdapter]:
    config = decoder_config(dataclasses.replace(ARGS, **changes), seq_len=SEQ_LEN)
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is swapped or missing
                parameter.uniform_(0.5, 1.5)
    return model.eval(), SonicStateDictAdapter(config, None)


def export(model: Module, adapter: SonicStateDictAdapter, folder: Path) -> dict[str, Any]:
    """Write the model as transformers' own files; return its state dict under their names."""
    state = {k: v.contiguous() for k, v in adapter.to_hf(dict(model.state_dict())).items()}
    safetensors_torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    adapter.write_config(folder, tokenizer=TOKENIZER.build(tokenizer_path=""))
    return state


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, adapter = build(**EXPRESSIBLE[name])
    state = export(model, adapter, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert theirs.config.model_type == name.split(",")[0]
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = model.config.enable_weight_tying
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in theirs.parameters())
    assert tied == ("lm_head.weight" not in state)
    tokens = torch.randint(0, ARGS.vocab_size, (2, SEQ_LEN))
    with torch.no_grad():
        ours = model(tokens, positions=torch.arange(SEQ_LEN).expand(2, -1).contiguous())
        expected = theirs.eval()(tokens).logits
    assert expected.std() > 0.5  # the bound below would say nothing about tiny logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_the_round_trip_is_bitwise_exact(name: str) -> None:
    model, adapter = build(**EXPRESSIBLE[name])
    state = dict(model.state_dict())
    back = adapter.from_hf(adapter.to_hf(state))
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype, key
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_place_is_refused(words: str, tmp_path: Path) -> None:
    model, adapter = build(**REFUSED[words])
    for convert in (
        lambda: adapter.to_hf(dict(model.state_dict())),
        lambda: adapter.from_hf({}),
        lambda: adapter.write_config(tmp_path, tokenizer=None),
    ):
        with pytest.raises(ValueError, match=f"no place for.*{words}"):
            convert()
    assert not list(tmp_path.iterdir())


def test_unknown_entries_are_refused_both_ways() -> None:
    model, adapter = build()
    state = dict(model.state_dict())
    extra = {"layers.0.moe.shared_experts.w1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"shared_experts\.w1\.weight has no place in a qwen3_moe"):
        adapter.to_hf(state | extra)
    hf = adapter.to_hf(state)
    with pytest.raises(ValueError, match=r"q_proj\.bias of a qwen3_moe checkpoint has no place"):
        adapter.from_hf(hf | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(1)})


def test_an_incomplete_set_of_experts_is_refused() -> None:
    model, adapter = build(qk_norm=False)
    hf = adapter.to_hf(dict(model.state_dict()))
    del hf["model.layers.1.block_sparse_moe.experts.7.w3.weight"]
    with pytest.raises(ValueError, match=r"only some experts of layers.1.*w3_EFD"):
        adapter.from_hf(hf)


def test_the_models_of_transformers_load_into_ours() -> None:
    """From a model that transformers made, not from our own export."""
    _, adapter = build(tie_embeddings=False)
    config = transformers.AutoConfig.for_model(**adapter.hf_config())
    theirs = transformers.Qwen3MoeForCausalLM(config).float().eval()
    state = {}
    for key, value in theirs.state_dict().items():
        if key.endswith("experts.gate_up_proj"):  # kept fused in memory, apart on disk
            for e, (gate, up) in enumerate(w.chunk(2) for w in value):
                stem = f"{key.removesuffix('gate_up_proj')}{e}"
                state |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif key.endswith("experts.down_proj"):
            stem = key.removesuffix("down_proj")
            state |= {f"{stem}{e}.down_proj.weight": w for e, w in enumerate(value)}
        else:
            state[key] = value
    model, adapter = build(tie_embeddings=False)
    missing, unexpected = model.load_state_dict(adapter.from_hf(state), strict=False)
    assert not missing and not unexpected
    tokens = torch.randint(0, ARGS.vocab_size, (1, SEQ_LEN))
    with torch.no_grad():
        ours = model(tokens, positions=torch.arange(SEQ_LEN)[None])
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)


def test_config_names_every_size(tmp_path: Path) -> None:
    _, adapter = build(qk_norm=False)
    adapter.write_config(tmp_path, tokenizer=None)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 16, "head_dim": 24}
    expected |= {"num_key_value_heads": 2, "num_experts_per_tok": 4, "rms_norm_eps": 1e-6}
    expected |= {"rope_theta": 5e5, "max_position_embeddings": SEQ_LEN, "vocab_size": 512}
    assert expected.items() <= config.items()
