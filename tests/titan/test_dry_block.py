"""The block on the hopper backend where there is no GPU: what is launched, saved and refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import dry_gpu

ROOT = Path(__file__).parents[2]

ROUTE = {"topk": ["topk"], "nearest": ["topk"]}
PLAN = {
    "topk": ["membership", "plan_rows"],
    "nearest": ["membership", "token_rounding", "plan_rows"],
}
EXPERTS = ["up", "down", "aggregate"]
BACKWARD = ["d_hidden", "d_weight2", "d_input", "aggregate", "d_weight13"]
BACKWARD += ["score_gradient", "topk_backward"]
# as one operator: the gate's gradients are an expert's
FUSED_BACKWARD = ["d_hidden", "d_weight2", "topk_backward", "d_input", "d_weight13"]
FUSED_BACKWARD += ["d_input", "aggregate", "d_weight13"]
ROUTERS = ("topk", "nearest")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if obstacle := dry_gpu.why_not():
        pytest.skip(obstacle)
    done = subprocess.run(
        [sys.executable, "-m", "tests.titan.dry_scenarios"],
        env=dry_gpu.environment(tmp_path_factory.mktemp("dry")),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fused_forward(router):
    return ROUTE[router] + PLAN[router] + EXPERTS


@pytest.mark.parametrize("router", ROUTERS)
def test_the_modules_launch_each_kernel_once(found, router):
    expected = ROUTE[router] + PLAN[router] + EXPERTS + BACKWARD
    assert found[router]["compiled"] == expected


@pytest.mark.parametrize("router", ROUTERS)
def test_the_eager_block_is_one_operator(found, router):
    assert found[router]["eager"] == fused_forward(router) + FUSED_BACKWARD


@pytest.mark.parametrize("router", ROUTERS)
def test_full_checkpointing_computes_the_forward_twice(found, router):
    assert found[router]["full AC"] == 2 * fused_forward(router) + FUSED_BACKWARD


@pytest.mark.parametrize("router", ROUTERS)
def test_selective_checkpointing_saves_the_choice_and_the_experts(found, router):
    forward = ROUTE[router] + PLAN[router] + EXPERTS
    assert found[router]["selective AC"] == forward + PLAN[router] + BACKWARD


@pytest.mark.parametrize("router", ROUTERS)
def test_a_second_backward_meets_the_overwritten_h(found, router):
    assert "modified by an inplace operation" in found[router]["second backward"]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_second_derivative_is_refused(found, router):
    assert "no second derivative" in found[router]["second derivative"]
