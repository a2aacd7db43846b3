"""`sonicmoe memory`: other implementations, checkpointing, the fit on a GPU, and the command."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, FullAC
from torchtitan.models.common.config_utils import make_routed_experts_config

from sonicmoe_titan.cli import run as sonicmoe
from sonicmoe_titan.memory_fit import (
    GIB,
    count_parameters,
    describe_activations,
    fits,
    layout_of,
    measure_first_block,
    rank_items,
    shape_of,
)
from sonicmoe_titan.memory_measure import SavedTensors, allocated_bytes, on_first_forward
from sonicmoe_titan.memory_measure_model import measure_layer, measured_shape
from sonicmoe_titan.memory_model import (
    LayerShape,
    experts_terms,
    layer_terms,
    moe_terms,
    total,
)
from sonicmoe_titan.memory_peaks import BACKWARD_STAGES, peak
from sonicmoe_titan.memory_peers import peers
from sonicmoe_titan.model import decoder_config
from sonicmoe_titan.model_args import ModelArgs
from sonicmoe_titan.selective_ac import SonicSelectiveAC
from sonicmoe_titan.toml_config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
DEBUG = CONFIGS / "debug.toml"
ARGS = ModelArgs(
    num_layers=2,
    dim=64,
    num_heads=4,
    num_kv_heads=2,
    expert_dim=32,
    num_experts=8,
    top_k=2,
    vocab_size=256,
    rounding_tile=16,
)
# SonicMoE v1, Figure 13: GiB of one layer on an H100, read off the bars.
# tokens, D, F, E, K: SonicMoE, ScatterMoE, MegaBlocks, MoMoE, Megatron-LM, DeepGEMM
FIGURE_13 = {
    (40960, 768, 256, 128, 8): (0.57, 1.13, 1.41, 0.99, 1.60, 1.00),
    (40960, 768, 512, 64, 4): (0.56, 0.90, 0.94, 0.75, 1.13, 0.76),
    (40960, 768, 1024, 32, 2): (0.56, 0.78, 0.70, 0.62, 0.90, 0.64),
    (24576, 1536, 256, 128, 8): (0.60, 1.20, 1.64, 1.10, 1.75, 1.14),
    (24576, 1536, 512, 64, 4): (0.60, 0.90, 1.06, 0.82, 1.19, 0.84),
    (24576, 1536, 1024, 32, 2): (0.60, 0.76, 0.75, 0.67, 0.91, 0.69),
    (32768, 4096, 256, 256, 16): (2.48, 6.48, None, 6.27, None, None),
    (32768, 4096, 512, 128, 8): (2.48, 4.48, 6.10, 4.23, 6.48, 4.31),
    (32768, 4096, 1024, 64, 4): (2.44, 3.44, 4.06, 3.23, 4.48, 3.27),
    (32768, 4096, 512, 256, 16): (4.48, 8.73, None, 8.27, 12.73, None),
    (32768, 4096, 1024, 128, 8): (4.48, 6.73, None, 6.23, 8.73, 6.31),
    (32768, 4096, 2048, 64, 4): (4.48, 5.73, 6.06, 5.23, 6.73, 5.31),
}  # None: no bar, or one that the module's docstring tells apart


def _shape(size: tuple[int, ...], **changes: object) -> LayerShape:
    num_tokens, dim, expert_dim, num_experts, top_k = size
    args = dataclasses.replace(
        ARGS, dim=dim, expert_dim=expert_dim, num_experts=num_experts, top_k=top_k
    )
    return LayerShape(args=args, num_tokens=num_tokens, **changes)


@pytest.mark.parametrize("size", FIGURE_13, ids=str)
def test_implementations_agree_with_the_published_bars(size: tuple[int, ...]) -> None:
    shape = _shape(size)
    num_tokens, dim, expert_dim, num_experts, _ = size
    weights, output = 6 * num_experts * dim * expert_dim, 2 * num_tokens * dim
    with_output = {"SonicMoE", "DeepGEMM"}
    predicted = {
        peer.name: (peer.bytes + weights + output * (peer.name in with_output)) / GIB
        for peer in peers(shape)
    }
    names = ("SonicMoE", "ScatterMoE", "MegaBlocks", "MoMoE", "Megatron-LM", "DeepGEMM")
    for name, bar in zip(names, FIGURE_13[size], strict=True):
        if bar is not None:
            assert predicted[name] == pytest.approx(bar, abs=0.07), name


def test_stock_torchtitan_keeps_what_we_say() -> None:
    shape = _shape((96, 64, 32, 8, 2))
    args = shape.args
    config = make_routed_experts_config(
        dim=args.dim,
        hidden_dim=args.expert_dim,
        num_experts=args.num_experts,
        top_k=args.top_k,
        param_init={},
        comm_backend="standard",
    )
    experts = config.build().bfloat16()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    x_BLD = torch.randn(1, shape.num_tokens, args.dim).bfloat16().requires_grad_()
    scores_BLE = torch.rand(1, shape.num_tokens, args.num_experts, requires_grad=True)
    scores_BLK, ids_BLK = scores_BLE.topk(args.top_k, dim=-1)
    counts_E = ids_BLK.flatten().bincount(minlength=args.num_experts)
    with SavedTensors(experts.parameters()) as saved:
        out_BLD = experts(x_BLD, scores_BLK, ids_BLK, counts_E)
    x_bytes = 2 * x_BLD.numel()  # kept by the router, which is not in here
    predicted = {peer.name: peer.bytes for peer in peers(shape)}["TorchTitan 0.3"]
    assert saved.bytes() + x_bytes == pytest.approx(predicted, rel=0.01), saved.read()
    assert out_BLD.shape == x_BLD.shape


def test_measurements_on_an_h100_are_what_the_formulas_say() -> None:
    """7B layer, MiB: official package 266, stock TorchTitan's flow 2188, ScatterMoE 1035."""
    found = {peer.name: peer.bytes / 2**20 for peer in peers(_shape((24576, 1536, 256, 128, 8)))}
    silu_gate = 2 * 24576 * 8 * 256 / 2**20  # ScatterMoE's package does not fuse its SwiGLU
    assert found["SonicMoE"] == pytest.approx(266, rel=0.01)
    assert found["TorchTitan 0.3"] == pytest.approx(2188, rel=0.01)
    assert found["ScatterMoE"] + silu_gate == pytest.approx(1035, rel=0.01)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_decoder_layer_is_predicted_within_one_percent(qk_norm: bool, dtype_bytes: int) -> None:
    args = dataclasses.replace(ARGS, qk_norm=qk_norm, shared_expert_dim=32, router="token_rounding")
    shape = LayerShape(args=args, num_tokens=128, value_bytes=dtype_bytes)
    shape = measured_shape(shape, tokens=128, cpu_tokens=128)
    for what, predicted, measured in measure_layer(shape):
        assert measured == pytest.approx(predicted, rel=0.01), what


@pytest.mark.parametrize("policy", [SonicSelectiveAC, FullAC])
@pytest.mark.parametrize("shared_expert_dim", [0, 32])
def test_checkpointed_layer_leaves_allocated_what_we_say(
    policy: type[ActivationCheckpointing], shared_expert_dim: int
) -> None:
    args = dataclasses.replace(
        ARGS, dim=128, expert_dim=64, shared_expert_dim=shared_expert_dim, router="token_rounding"
    )
    shape = measured_shape(LayerShape(args=args, num_tokens=1024), tokens=1024, cpu_tokens=1024)
    name = "full" if policy is FullAC else "selective"
    rows = measure_layer(shape, policy=policy.Config().build(), checkpointing=name)
    what, predicted, measured = rows[-1]
    # not named: the states of the random generators, 5 kB
    assert measured == pytest.approx(predicted, rel=0.03), what


def test_saved_tensors_count_each_storage_once_and_no_parameters() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    with SavedTensors([weight]) as saved:
        y = (x @ weight) * x.view(4, 8)  # keeps x twice, the weight, and the product
    assert saved.bytes() == 2 * x.numel() * 4
    y.sum().backward()
    assert x.grad is not None


def test_what_the_graph_let_go_is_not_counted() -> None:
    x = torch.randn(64, requires_grad=True)
    with SavedTensors() as saved:
        y = x.exp()
        _ = y.sin().detach()
    assert saved.bytes() == 64 * 4  # exp keeps its result; sin's input is the same storage
    del y, _
    assert saved.bytes() == 0


def test_first_forward_in_training_is_measured_once() -> None:
    module, told = nn.Linear(8, 4), []
    on_first_forward(module, told.append)
    x = torch.randn(3, 8)
    with torch.no_grad():
        module(x)
    module.eval()(x)
    assert told == []
    module.train()
    for _ in range(2):
        module(x).sum().backward()
    assert told == [3 * 8 * 4]  # x, and no weight
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_allocator_sees_live_bytes_and_the_peak() -> None:
    def call() -> torch.Tensor:
        temporary = torch.empty(2**20, dtype=torch.uint8)
        kept = torch.empty(2**18, dtype=torch.uint8)
        del temporary
        return kept

    kept, allocated = allocated_bytes(call, device=torch.device("cpu"))
    assert kept.numel() == allocated.live == 2**18
    assert allocated.peak == 2**20 + 2**18


def test_expert_parallel_bound_is_never_below_the_expectation() -> None:
    for ranks in (2, 4, 8):
        for router in ("topk", "token_rounding"):
            args = dataclasses.replace(ARGS, router=router)
            expected, bound = (
                LayerShape(args=args, num_tokens=256, expert_parallel=ranks, load=load)
                for load in ("expected", "bound")
            )
            assert total(moe_terms(expected)) <= total(moe_terms(bound))
            assert expected.received_tokens <= 256 * ranks
            assert bound.rows <= 256 * ranks * min(args.top_k + 1, expected.local_experts)


def test_one_rank_of_expert_parallelism_is_none() -> None:
    shape = LayerShape(args=ARGS, num_tokens=64)
    assert shape.rows == shape.sent_rows
    assert shape.received_tokens == 64


def test_memory_is_the_same_at_every_granularity() -> None:
    """The paper's claim: with F K fixed, what the experts keep does not depend on K."""
    sizes = [(4096, 256, 64 * 8 // K, 8 * K, K) for K in (1, 2, 4, 8)]
    kept = [
        sum(term.bytes for term in experts_terms(_shape(size)) if term.part == "experts")
        for size in sizes
    ]
    assert len(set(kept)) == 1
    transient = [total(peak(_shape(size), BACKWARD_STAGES)[1]) for size in sizes]
    assert transient == sorted(transient)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"qk_norm": False}])
def test_counted_parameters_are_the_models(changes: dict[str, bool]) -> None:
    args = dataclasses.replace(ARGS, shared_expert_dim=16, **changes)
    with torch.device("meta"):
        model = decoder_config(args, seq_len=64).build()
    counted = count_parameters(args)
    predicted = args.num_layers * (counted.dense + counted.experts) + counted.embeddings
    assert predicted == sum(parameter.numel() for parameter in model.parameters())


def test_rank_items_follow_the_sharding() -> None:
    config = load_config(DEBUG)
    alone = rank_items(config, layout_of(config, num_gpus=1), load="bound")
    shared = rank_items(config, layout_of(config, num_gpus=8), load="bound")
    assert alone["parameters"] == pytest.approx(8 * shared["parameters"], rel=0.01)
    assert alone["optimizer state (Adam)"] == 2 * alone["parameters"]
    assert alone["activations kept"] == shared["activations kept"]
    layers = config.model.num_layers
    shape = shape_of(config, layout_of(config, num_gpus=1), load="bound")
    assert alone["activations kept"] == layers * total(layer_terms(shape))


def test_gpu_count_that_does_not_fit_the_degrees_is_refused() -> None:
    config = load_config(DEBUG, ["--parallelism.data_parallel_shard_degree", "4"])
    with pytest.raises(ValueError, match="give --gpus 4 or change a degree"):
        layout_of(config, num_gpus=3)


def test_log_of_a_tensor_parallel_run_states_a_bound_and_measures_nothing() -> None:
    config = load_config(DEBUG, ["--parallelism.tensor_parallel_degree", "2"])
    assert "predicted: at most" in describe_activations(config, num_gpus=2)
    assert "at most" not in describe_activations(load_config(DEBUG), num_gpus=2)
    measure_first_block(config, [], num_gpus=2)  # a model without parts would raise


def test_unknown_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="h100-80gb"):
        fits({}, "h100")


def test_command_writes_csv_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sonicmoe(["memory", str(DEBUG), "--tokens", "256", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for word in ("ScatterMoE", "MoMoE", "MegaBlocks", "Megatron", "TorchTitan", "h100-80gb"):
        assert word in printed
    with (tmp_path / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = {row["name"]: row for row in rows if row["table"] == "measured"}
    op = measured["experts' op"]
    assert op["predicted_bytes"] == op["measured_bytes"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_command_warns_of_a_model_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["memory", str(DEBUG), "--no-measure", "--out", str(tmp_path)]
    assert sonicmoe([*arguments, "--training.local_batch_size", "200000"]) == 1
    assert "do not fit h100-80gb" in " ".join(capsys.readouterr().out.split())


def test_command_notes_checkpointing_that_costs_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under expert parallelism selective checkpointing keeps every row that travelled."""
    moe_7b = CONFIGS / "moe_7b.toml"
    base = ["memory", str(moe_7b), "--no-measure", "--out", str(tmp_path)]
    ep = ["--training.disable_cuda_graphs", "true", "--parallelism.expert_parallel_degree", "8"]
    note = "without activation checkpointing a layer would keep less"
    assert sonicmoe(base) == 0
    assert note not in " ".join(capsys.readouterr().out.split())
    assert sonicmoe([*base, *ep]) == 1
    assert note in " ".join(capsys.readouterr().out.split())
    assert sonicmoe([*base, *ep, "--activation_checkpoint", "none"]) == 0
    assert "if the routing sent every token" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu", "h1000"],
        ["--model.num_layerz", "3"],
        ["--tokens", "1"],
        ["--gpus", "3", "--parallelism.data_parallel_shard_degree", "2"],
        ["--parallelism.expert_parallel_degree", "3"],
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["memory", str(DEBUG), "--out", str(tmp_path), *arguments]
    assert sonicmoe(given) == 2
    assert capsys.readouterr().err.count("\n") == 1
