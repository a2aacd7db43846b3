"""The parts of gpu_suite.py: commands, what they are for, how long they take."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.process import ROOT

PYTHON = sys.executable
CONFIGS = ("moe_7b", "moe_1p4b_k2", "moe_1p4b_k8", "debug", "token_rounding")
# What tests/gpu/test_training.py changes about debug.toml for the block as one operator.
FUSED = ["--model.num_experts", "64", "--model.aux_loss_coeff", "0"]
FUSED += ["--model.fused_block", "always"]
# What the peers' autotuners chose is kept on disk and found again, also after an interruption.
TUNED_ONCE = (
    ("QUACK_CACHE_AUTOTUNING", "1"),
    ("QUACK_CACHE_DIR", str(ROOT / "outputs" / "official_autotune")),
    ("TRITON_CACHE_AUTOTUNING", "1"),
)
VARIANT_CASES = "7b,1.4b,sparse,7b_zipf"
HUGE_TESTS = "31_bits or 2_to_the_31"  # several GiB each
PAPER_TESTS = "every_shape_of_the_paper"  # up to 50 GB each


class Part(NamedTuple):
    """Commands that run one after the other until one fails.

    limit_s: of all of them together. expected_s: a guess, for --list and --deadline. needs: whose
    packages --pythonpath must name. proof: a pattern that the log of a passing part contains (where
    there is no GPU, tests skip and pytest is content). gpus: that it uses. alone: nothing else may
    run on the machine meanwhile.
    """

    about: str
    commands: tuple[list[str], ...]
    expected_s: int
    limit_s: int
    environment: tuple[tuple[str, str], ...] = ()
    needs: str = ""
    proof: str = ""
    gpus: int = 1
    alone: bool = False


def script(name: str, *words: str) -> list[str]:
    """A command of this folder's parent."""
    return [PYTHON, str(ROOT / "scripts" / name), *words]


def pytest(*words: str, processes: int = 1) -> list[str]:
    """A pytest command; several processes where pytest-xdist is installed."""
    command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-rfEs", *words]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(processes if processes > 1 else 0)]
    return command


def parts(*, jobs: int, out: Path, pythonpath: Sequence[str] = ()) -> dict[str, Part]:
    """Every part by name, in the order in which to run them."""
    folder = ("--out", str(out))

    def moe(shapes: str, impls: str, *words: str) -> tuple[list[str], ...]:
        chosen = ("--shapes", *shapes.split(), "--impls", *impls.split(), "--append", *folder)
        return (script("bench_moe.py", *chosen, *words),)

    peers = ("--pythonpath", *pythonpath) if pythonpath else ()
    # The official package tunes each of six GEMMs for 80 s in its first round of a shape.
    tuning = ("--limit", "560", "--deadline", "480", *peers)
    sparsest = ("--shapes", "sparsest", "--impls", "sonicmoe", "official", "--append")
    return {
        "warmup": Part(
            "compile the kernels of the other parts", _warmup(jobs), 150, 1800, gpus=0, alone=True
        ),
        **_tests(),
        **_sanitizer(),
        "variants": Part(
            "challengers of the tables' tiles beside them, each checked first",
            (script("gpu_check.py", "variants", "--cases", VARIANT_CASES),),
            expected_s=120,
            limit_s=500,
        ),
        "moe-ours": Part(
            "our experts on every shape",
            moe("paper models skewed small all", "sonicmoe", "--rounds", "3", "--deadline", "450"),
            expected_s=270,
            limit_s=560,
        ),
        "moe-torch": Part(
            "our experts beside the torch backend",
            moe("7b 1.4b 30b_n1024 30b_n256 sparse qwen3_30b", "sonicmoe torch", "--rounds", "3"),
            expected_s=100,
            limit_s=300,
        ),
        "moe-official": Part(
            "our experts beside the official package",
            moe("7b 1.4b", "sonicmoe official", *tuning),
            expected_s=580,
            limit_s=590,
            needs="official",
            environment=TUNED_ONCE,
        ),
        "moe-liger": Part(
            "our experts beside Liger",
            moe("qwen3_30b 7b", "sonicmoe liger", "--limit", "200", "--deadline", "200", *peers),
            expected_s=150,
            limit_s=420,
            needs="liger",
            environment=TUNED_ONCE,
        ),
        "granularity": Part(
            "rate and memory against granularity, beside cuBLAS",
            (script("bench_granularity.py", *folder),),
            expected_s=80,
            limit_s=240,
        ),
        "router-ours": Part(
            "whole layers, token choice and token rounding",
            (script("bench_router.py", "--append", "--deadline", "200", *folder),),
            expected_s=120,
            limit_s=300,
        ),
        "router-official": Part(
            "the same beside the official package on the sparsest rows",
            (script("bench_router.py", *sparsest, *tuning, *folder),),
            expected_s=580,
            limit_s=590,
            needs="official",
            environment=TUNED_ONCE,
        ),
        "train-speed": Part(
            "training beside stock TorchTitan, the first rows of the plan",
            (script("bench_train.py", "speed", "--deadline", "540", *folder),),
            expected_s=540,
            limit_s=590,
        ),
        "train-memory": Part(
            "activation bytes, predicted and measured",
            (script("bench_train.py", "memory", *folder),),
            expected_s=60,
            limit_s=200,
        ),
        "train-losses": Part(
            "losses of the backends, eager and compiled",
            (script("bench_train.py", "losses", "--modes", "eager", "compiled", *folder),),
            expected_s=400,
            limit_s=590,
        ),
    }


def _tests() -> dict[str, Part]:
    """tests/gpu, every file in one part or, split by test, in two."""

    def run(about: str, files: str, *words: str, processes: int = 1, seconds: int) -> Part:
        names = [f"tests/gpu/test_{name}.py" for name in files.split()]
        command = pytest(*names, *words, processes=processes)
        return Part(about, (command,), seconds, 5 * seconds, proof=r"\d+ passed.*")

    small = ("-k", f"not ({HUGE_TESTS})")
    return {
        "tests-experts": run(
            "moe_experts: oracle, mutations, garbage, streams, repeats, graphs, inductor",
            "moe_experts moe_hopper",
            "-k",
            f"not {PAPER_TESTS}",
            processes=4,
            seconds=75,
        ),
        "tests-shapes": run(
            "moe_experts at every shape of the paper, one at a time",
            "moe_hopper",
            "-k",
            PAPER_TESTS,
            seconds=200,
        ),
        "tests-rows": run(
            "the ragged-M kernels: every routing, width, tile, activation",
            "row_kernels",
            *small,
            processes=6,
            seconds=130,
        ),
        "tests-columns": run(
            "weight gradients and aggregation",
            "weight_grad aggregate",
            *small,
            processes=6,
            seconds=45,
        ),
        "tests-huge": run(
            "tensors beyond 2^31 elements, one at a time",
            "row_kernels weight_grad aggregate",
            "-k",
            HUGE_TESTS,
            seconds=40,
        ),
        "tests-host": run(
            "host time of the block at 1024 tokens, alone on the machine",
            "host_cost",
            seconds=30,
        )._replace(alone=True),
        "tests-first-call": run(
            "a process's first layer, from an empty kernel cache and from a filled one",
            "first_call",
            seconds=45,
        )._replace(alone=True),
        "tests-routing": run(
            "top-k, plans, token rounding",
            "topk_gpu plan_gpu routing_gpu",
            processes=6,
            seconds=270,
        ),
        "tests-block": run(
            "the block: memory, router under a graph, fp32 logits",
            "memory_gpu router_graph float32_product",
            seconds=30,
        ),
        "tests-fused": run(
            "the eager block as one operator against its modules",
            "fused",
            processes=6,
            seconds=35,
        ),
        "tests-training": run("whole runs of the debug model, all at once", "training", seconds=80),
        "tests-devices": run(
            "what needs two GPUs: another current device, training over NCCL",
            "moe_hopper two_gpus",
            "-k",
            "device or layout",
            seconds=150,
        )._replace(proof=r"\d+ (?:passed|skipped).*", gpus=2),  # one GPU: nothing to do
    }


def _sanitizer() -> dict[str, Part]:
    """Whole small layers under compute-sanitizer."""

    def under(tool: str, *options: str) -> tuple[list[str], ...]:
        fail = ("--error-exitcode", "1", *options)
        return (["compute-sanitizer", "--tool", tool, *fail, *script("launch_layers.py")],)

    clean = "ERROR SUMMARY: 0 errors"

    return {
        "sanitizer-memcheck": Part(
            "compute-sanitizer memcheck over whole small layers",
            under("memcheck", "--report-api-errors", "no"),  # torch asks what it knows may fail
            expected_s=15,
            limit_s=300,
            proof=clean,
            environment=(
                ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),
            ),  # an allocation for every tensor
        ),
        "sanitizer-synccheck": Part(
            "compute-sanitizer synccheck over the same",
            under("synccheck"),
            expected_s=15,
            limit_s=300,
            proof=clean,
        ),
    }


def _warmup(jobs: int) -> tuple[list[str], ...]:
    """Commands that fill the kernel cache; they need no GPU."""
    cores = ("--jobs", str(jobs))
    run = [PYTHON, "-m", "sonicmoe_titan.cli", "warmup"]
    return (
        script("gpu_check.py", "build", "--cases", "small,extra,activations,all", *cores),
        script("gpu_check.py", "build", "--variants", "--cases", VARIANT_CASES, *cores),
        script("bench_router.py", "--build", *cores),
        [PYTHON, "-m", "tests.titan.fused_blocks", *cores],
        *(
            [*run, str(ROOT / "configs" / f"{name}.toml"), *cores, "--model.router", router, *more]
            for name, more in (*((name, []) for name in CONFIGS), ("debug", FUSED))
            for router in ("topk", "token_rounding")
        ),
    )
