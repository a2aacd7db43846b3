"""What one step of the MoE block asks of the host: numbers that no loaded machine can blur.

A process on the dry GPU runs torch's CUDA path without a GPU; `scripts/host_cost.py` turns the same
step into microseconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import dry_gpu

SCRIPT = Path(__file__).parents[2] / "scripts" / "host_cost.py"

EXPERTS = {"forward": 3, "backward": 5}
BLOCK = EXPERTS | {
    "gate": 1,
    "topk": 1,
    "plan": 2,
    "gradients of topk and gate": 3,
}
LAUNCHES = {"experts": EXPERTS, "topk": BLOCK, "nearest": BLOCK | {"token_rounding": 1}}
# Python functions and built-ins called; a little above what torch 2.14 takes.
CALLS = {"experts": 165, "topk": 97, "nearest": 97}


@pytest.fixture(scope="module")
def counts(shared_folder):
    if obstacle := dry_gpu.why_not():
        pytest.skip(obstacle)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--counts"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("subject", CALLS)
def test_a_step_never_waits_for_the_device_and_allocates_nothing_new(counts, subject):
    asked = counts[subject]
    assert (asked["waits"], asked["copies"], asked["allocations"]) == (0, 0, 0)


def test_every_launch_is_known(counts):
    launches = {name: counts[name]["launches"] for name in CALLS}
    assert launches == {name: sum(parts.values()) for name, parts in LAUNCHES.items()}


@pytest.mark.parametrize("subject", CALLS)
def test_a_step_takes_few_calls_of_python(counts, subject):
    assert counts[subject]["calls"] <= CALLS[subject]
