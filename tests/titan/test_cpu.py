"""TorchTitan on a machine without an accelerator."""

import subprocess
import sys

import pytest
import torch
from torchtitan.tools import utils

import sonicmoe_titan  # prepares TorchTitan for the CPU  # noqa: F401
from sonicmoe_titan import cpu

without_accelerator = pytest.mark.skipif(
    torch.cuda.is_available(), reason="an accelerator is left alone"
)


@without_accelerator
def test_torchtitan_finds_the_cpu() -> None:
    assert utils.device_type == "cpu"
    assert utils.device_module is torch.cpu
    assert utils.get_device_info()[0] == "cpu"


@without_accelerator
def test_torchtitan_imported_first_is_corrected() -> None:
    code = (
        "import torchtitan.tools.utils as utils, torchtitan.components.metrics as metrics\n"
        "assert utils.device_type == 'cuda'\n"
        "import sonicmoe_titan, torch\n"
        "assert utils.device_type == metrics.device_type == 'cpu'\n"
        "assert metrics.device_module is torch.cpu\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_of_this_process_is_reported_in_bytes() -> None:
    stats = cpu.memory_stats()
    total = cpu.get_device_properties().total_memory
    assert 50 << 20 < stats["active_bytes.all.peak"] < total  # torch alone takes more than 50 MiB


def test_accelerator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_prepared", False)
    monkeypatch.setattr(torch._utils, "_get_available_device_type", lambda: "cuda")
    before = dict(vars(torch.cpu))
    cpu.prepare_cpu()
    assert torch._utils._get_available_device_type() == "cuda"
    assert dict(vars(torch.cpu)) == before
