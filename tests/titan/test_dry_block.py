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


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("scenario", ["eager", "compiled"])
def test_each_kernel_is_launched_once(found, router, scenario):
    expected = ROUTE[router] + PLAN[router] + EXPERTS + BACKWARD
    assert found[router][scenario] == expected


@pytest.mark.parametrize("router", ROUTERS)
def test_full_checkpointing_computes_the_forward_twice(found, router):
    forward = ROUTE[router] + PLAN[router] + EXPERTS
    assert found[router]["full AC"] == 2 * forward + BACKWARD


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
