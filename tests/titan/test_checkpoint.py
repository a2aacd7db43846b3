"""Resuming: exact, across layouts, from and to stock TorchTitan, and after a kill."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.titan import checkpoint_scenarios as scenarios
from tests.titan.ranks import run_on_ranks, start


@pytest.fixture(scope="module")
def two_ranks(shared_folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(scenarios.two_ranks, ranks=2, base=shared_folder)


@pytest.fixture(scope="module")
def one_rank(shared_folder: Path, two_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return run_on_ranks(scenarios.one_rank, ranks=1, base=shared_folder)[0]


@pytest.mark.parametrize("run", ["", "streamed "])
def test_resuming_the_same_layout_is_bitwise_exact(two_ranks: list, run: str) -> None:
    for rank, results in enumerate(two_ranks):
        whole, resumed = results[run.strip() or "whole"], results[f"{run}resumed"]
        assert list(resumed.losses) == [3, 4]
        assert resumed.losses == {step: whole.losses[step] for step in (3, 4)}, rank
        assert resumed.digest == whole.digest, rank


def test_stochastic_routing_depends_on_the_saved_generators(two_ranks: list) -> None:
    whole, redrawn = two_ranks[0]["whole"], two_ranks[0]["redrawn"]
    assert redrawn.losses[3] == pytest.approx(whole.losses[3], rel=0.1)
    assert redrawn.losses[3] != whole.losses[3]


def test_expert_parallel_run_resumes_without_expert_parallelism(two_ranks: list) -> None:
    ep2, ep1 = two_ranks[0]["ep2"].losses, two_ranks[0]["ep1 resumed"].losses
    assert list(ep1) == [3, 4]
    for step in (3, 4):
        assert ep1[step] == pytest.approx(ep2[step], rel=1e-5)


def test_another_data_parallel_degree_continues_with_the_same_data(
    two_ranks: list, one_rank: dict
) -> None:
    before, after = two_ranks[0]["degree 2"].losses, one_rank["degree 1 resumed"].losses
    assert list(after) == [3, 4]
    for step in (3, 4):
        assert after[step] == pytest.approx(before[step], rel=1e-5)


def test_another_degree_is_refused_for_a_stream(one_rank: dict) -> None:
    error = one_rank["streamed degree 1"]["error"]
    assert "2 data-parallel ranks and this run has 1" in error
    assert "--checkpoint.exclude_from_loading dataloader" in error
    assert "\n" not in error


def test_a_stock_run_resumes_in_ours_with_its_optimizer_state(one_rank: dict) -> None:
    assert one_rank["stock in ours"] == {"step": 3, "digest": one_rank["stock"].digest}
    assert list(one_rank["ours"].losses) == [4, 5]


def test_our_run_resumes_in_stock_with_its_optimizer_state(one_rank: dict) -> None:
    assert one_rank["ours in stock"] == {"step": 5, "digest": one_rank["ours"].digest}


def test_a_model_only_last_step_is_passed_over(one_rank: dict) -> None:
    assert one_rank["steps"] == ["step-2", "step-4", "step-5"]
    assert one_rank["model only"]["step"] == 4


def test_asking_for_a_model_only_step_is_one_clear_error(one_rank: dict) -> None:
    error = one_rank["model only asked for"]["error"]
    assert "holds the model alone" in error
    assert "--checkpoint.initial_load_path" in error


def test_torn_and_unfinished_folders_are_never_loaded(one_rank: dict) -> None:
    assert one_rank["torn"]["step"] == 2
    assert not one_rank["leftover exists"]


def test_a_checkpoint_of_another_model_is_one_clear_error(one_rank: dict) -> None:
    assert "belongs to another model" in one_rank["deeper model"]["error"]
    assert "lacks layers.2.attention." in one_rank["deeper model"]["error"]
    error = one_rank["other model"]["error"]
    assert "w1_EFD as (8, 16, 32), this run has (16, 16, 32)" in error


def test_an_export_without_a_place_is_refused_before_training(one_rank: dict) -> None:
    assert "shared experts (model.shared_expert_dim)" in one_rank["export"]


def test_a_tokenizer_larger_than_the_model_is_refused(one_rank: dict) -> None:
    assert "model.vocab_size = 256: the tokenizer has 512 entries" in one_rank["vocabulary"]


def test_exported_experts_are_the_trained_ones(two_ranks: list, shared_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_folder / "checkpoint_scenarios.two_ranks/exported/checkpoint/step-2"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "MixtralForCausalLM"
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, scenarios.ARGS.vocab_size, (2, 32), generator=generator)
    with torch.no_grad():
        theirs = model.eval()(tokens).logits
    torch.testing.assert_close(two_ranks[0]["exported logits"], theirs, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = scenarios.TOKENIZER.build(tokenizer_path="")
    text = "def f(x): return x + 1"
    assert tokenizer(text)["input_ids"] == ours.encode(text)


def test_an_export_loads_into_another_layout(two_ranks: list) -> None:
    for results in two_ranks:
        torch.testing.assert_close(
            results["imported logits"], results["exported logits"], atol=1e-5, rtol=0
        )


def test_a_run_killed_while_saving_resumes_from_the_last_complete_step(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    process = start(scenarios.saves_until_killed, rank=0, ranks=1, folder=folder)
    metadata = folder / "checkpoint/step-2/.metadata"
    try:
        _wait(folder / "going back", process, folder)
        deadline = time.monotonic() + 120
        while metadata.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not metadata.exists(), "killed too late to interrupt the save"
    resumed = run_on_ranks(scenarios.resumes_after_kill, ranks=1, base=tmp_path)[0]
    before = torch.load(folder / "losses.pt", weights_only=False)
    assert resumed.losses == {2: before[2]}
    assert metadata.exists()


def _wait(path: Path, process: Any, folder: Path) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail((folder / "rank0.log").read_text()[-4000:])
        time.sleep(0.01)
