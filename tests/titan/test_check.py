"""`sonicmoe check`: what would stop a run is said in one line before it starts."""

import re
from pathlib import Path

import pytest
import torch

from sonicmoe_titan import check, cli
from sonicmoe_titan.check import check_run
from sonicmoe_titan.config_registry import CONFIGS
from sonicmoe_titan.run_sizes import data_ranks, microbatch_tokens
from sonicmoe_titan.toml_config import load_config

RUN = "run.toml"


@pytest.fixture(autouse=True)
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checked run, 1024 tokens of 16 experts, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    Path(RUN).write_text(
        '[job]\nrecipe = "base"\n'
        '[model]\nrouter = "token_rounding"\nrounding_tile = 64\n'
        "[training]\nlocal_batch_size = 8\nseq_len = 128\ndisable_cuda_graphs = true\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "--parallelism.expert_parallel_degree 3",
            "parallelism.expert_parallel_degree = 3 does not divide model.num_experts = 16",
        ),
        ("--parallelism.expert_parallel_degree 4 --nproc 2", "expected a divisor of 2"),
        ("--parallelism.tensor_parallel_degree 8", "does not divide model.num_heads = 4"),
        ("--parallelism.tensor_parallel_degree 2 --nproc 3", "a multiple of 2 processes"),
        ("--parallelism.data_parallel_shard_degree 4 --nproc 2", "= 4 processes, there are 2"),
        ("--parallelism.data_parallel_shard_degree 0", "expected a number above 0, or -1"),
        ("--parallelism.context_parallel_degree 0", "expected a number above 0"),
        ("--training.seq_len 129 --parallelism.tensor_parallel_degree 2", "a multiple of 2"),
        ("--training.seq_len 130 --parallelism.context_parallel_degree 2", "a multiple of 4"),
        ("--lr_scheduler.warmup_steps -1", "warmup_steps = -1: expected 0 or more"),
        (
            "--parallelism.context_parallel_degree 2",
            'model.attention = "auto" does not work with context parallelism here: use "flex"',
        ),
        (
            "--parallelism.context_parallel_degree 2 --parallelism.spmd_backend partial_dtensor "
            "--nproc 2",
            "context_parallel_degree = 2 needs GPUs",
        ),
        ("--training.steps -1", "training.steps = -1: expected a number above 0"),
        ("--training.global_batch_size 12 --nproc 1", "expected -1 or a multiple of 8"),
        ("--training.global_batch_size 8 --nproc 2", "multiple of 16"),
        ("--model.rounding_tile 2048", "is more than the 1024 tokens of a microbatch"),
        (
            "--model.rounding_tile 512 --parallelism.context_parallel_degree 4 "
            "--model.attention flex",
            "is more than the 256 tokens of a microbatch",
        ),
        ("--parallelism.pipeline_parallel_degree 2", "model.tie_embeddings = true does not work"),
        (
            "--parallelism.pipeline_parallel_degree 2 --model.no-tie_embeddings "
            "--parallelism.pipeline_parallel_schedule 1F2B",
            "Unknown schedule name '1F2B'",
        ),
        (
            "--parallelism.pipeline_parallel_degree 8 --model.no-tie_embeddings",
            "is more than model.num_layers = 4",
        ),
        (
            "--parallelism.pipeline_parallel_degree 2 --model.no-tie_embeddings "
            "--training.no-disable_cuda_graphs",
            "CUDA graphs do not support pipeline parallelism",
        ),
        (
            "--parallelism.expert_parallel_degree 2 --training.no-disable_cuda_graphs",
            "--training.disable_cuda_graphs",
        ),
        (
            "--dataloader.corpus folders --dataloader.folders /no/such",
            'dataloader.folders[0] = "/no/such": no such path',
        ),
        ("--hf_assets_path /no/such/place", 'hf_assets_path = "/no/such/place": no such path'),
        (
            "--validator.enable --validator.dataloader.dataset_path /no/such",
            'validator.dataloader.dataset_path = "/no/such": no such path',
        ),
        ("--checkpoint.initial_load_path /no/such", "checkpoint.initial_load_path"),
        (f"--dump_folder {RUN}/outputs", "run.toml is no folder to write to"),
        (
            "--model.vocab_size 512",
            "tokenizer.vocab_size = 4096 is more than model.vocab_size = 512",
        ),
        ("--model.expert_dim 20", "model.expert_dim = 20: expected a multiple of 8"),
        ("--model.num_heads 3", "model.num_heads = 3 does not divide model.dim = 128"),
        ("--model.num_kv_heads 3", "model.num_kv_heads = 3 does not divide model.num_heads"),
        ("--model.num_expert_groups 4", "set both or neither"),
        ("--model.num_expert_groups 16 --model.num_limited_groups 4", "2 experts or more"),
        ("--model.num_expert_groups 8 --model.num_limited_groups 1", "enough of them"),
        ("--model.score_func sigmoid --model.softmax_order after", "has no meaning with"),
        ("--model.attention flex --nproc 1", "needs a GPU, there is none"),
        ("--model.backend hopper --nproc 1", 'model.backend = "hopper": '),
    ],
)
def test_impossible_run_is_refused_in_one_line(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["check", RUN, *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert re.fullmatch(r"error: (command line|run\.toml): .+\n", captured.err)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--nproc 1",
        "--nproc 2 --parallelism.expert_parallel_degree 2",
        "--nproc 4 --parallelism.expert_parallel_degree 4 --parallelism.tensor_parallel_degree 2",
        "--nproc 4 --parallelism.data_parallel_replicate_degree 2",
        "--nproc 2 --parallelism.pipeline_parallel_degree 2 --model.no-tie_embeddings "
        "--model.rounding_tile 32",
        "--nproc 2 --training.global_batch_size 64",
        "--model.router topk --model.rounding_tile 4096",
        "--compile.enable --compile.backend aot_eager --nproc 1",
    ],
)
def test_possible_run_is_described_in_one_line(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["check", RUN, *arguments.split()]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert re.fullmatch(r"run\.toml: ok: 2\.\dM parameters .* steps of .* tokens\n", captured.out)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ("--model.rounding_tile 512", 256),
        ("--parallelism.pipeline_parallel_degree 2 --model.no-tie_embeddings", 32),
    ],
)
def test_less_than_a_tile_of_rows_per_expert_warns(
    arguments: str, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["check", RUN, *arguments.split()]) == 0
    _, warning = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: ") and f"gives an expert {rows} rows on average" in warning
    assert cli.run(["check", RUN, *arguments.split(), "--model.router", "topk"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_validation_on_another_text_warns(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", str(CONFIGS / "moe_1p4b_k2.toml"), "--dataloader.corpus", "python_stdlib"]
    assert cli.run(command) == 0
    assert "training reads python_stdlib, validation fineweb_edu" in capsys.readouterr().out
    for same in (["--validator.dataloader.corpus", "python_stdlib"], ["--validator.no-enable"]):
        assert cli.run([*command, *same]) == 0
        assert "warning" not in capsys.readouterr().out


def test_inductor_without_a_compiler_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    assert cli.run(["check", RUN, "--compile.enable", "--nproc", "1"]) == 2
    assert "needs a C++ compiler" in capsys.readouterr().err


def test_hopper_backend_on_another_gpu_is_one_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA B200")
    run = ["check", RUN, "--nproc", "1", "--training.mixed_precision_param", "bfloat16"]
    assert cli.run([*run, "--model.backend", "auto"]) == 0
    capsys.readouterr()
    assert cli.run([*run, "--model.backend", "hopper"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: command line: model.backend")


def test_float32_experts_on_a_gpu_are_one_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["check", RUN, "--nproc", "1", "--training.mixed_precision_param", "float32"]
    assert cli.run(run) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capsys.readouterr()
    assert cli.run(run) == 2
    assert 'set it to "bfloat16"' in capsys.readouterr().err
    assert cli.run([*run, "--model.moe", "stock", "--model.router", "topk"]) == 0


def test_print_config_prints_a_file_that_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["check", RUN, "--print-config", "--training.steps", "3"]) == 0
    path = tmp_path / "resolved.toml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path).training.steps == 3
    assert cli.run(["check", str(path)]) == 0


def test_tokens_of_a_microbatch_follow_the_parallelism() -> None:
    def tokens(*overrides: str) -> int:
        return microbatch_tokens(load_config(RUN, overrides))

    assert tokens() == 8 * 128
    assert tokens("--parallelism.context_parallel_degree=2") == 4 * 128
    assert tokens("--parallelism.tensor_parallel_degree=2") == 8 * 128
    ep = "--parallelism.expert_parallel_degree=2"
    assert tokens("--parallelism.tensor_parallel_degree=2", ep) == 4 * 128
    pp = ["--parallelism.pipeline_parallel_degree=2", "--model.no-tie_embeddings"]
    assert tokens(*pp) == 128


def test_data_ranks_are_what_the_other_degrees_leave() -> None:
    config = load_config(RUN, ["--parallelism.tensor_parallel_degree=2"])
    assert data_ranks(config, 8) == 4
    assert data_ranks(config, None) is None
    check_run(config, num_processes=8)


def test_unknown_subcommand_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["chek"]) == 2
    assert "did you mean check?" in capsys.readouterr().err
    assert cli.run(["--help"]) == 0
    assert "sonicmoe COMMAND" in capsys.readouterr().out
