"""Where, when and at which rates a benchmark ran: what its records carry beside their numbers."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.process import ROOT

PACKAGES = (
    "torch",
    "triton",
    "torchtitan",
    "nvidia-cutlass-dsl",
    "sonic-moe",
    "quack-kernels",
    "liger-kernel",
)
MATMUL_SIZE, MATMUL_WARM, MATMUL_RUNS = 8192, 10, 300  # half a second at 600 TFLOP/s and more
COPY_BYTES, COPY_RUNS = 2**31, 40
SAMPLE_S = 0.02
NVML_CLOCK_SM = 1


def short_name(device: str) -> str:
    """ "h100" of "NVIDIA H100 80GB HBM3"."""
    words = device.lower().split()
    return words[1] if words[0] == "nvidia" else words[0]


def record_name(kind: str, device: str) -> str:
    """`kind` and the GPU, "train_h100": every kind of GPU has files of its own."""
    return f"{kind}_{short_name(device)}"


def record_path(folder: Path, kind: str) -> Path:
    """Where `folder` keeps the records of `kind` of this machine's GPU."""
    return folder / f"{record_name(kind, where_and_when()['device'])}.json"


def recorded(folder: Path, kind: str) -> list[Path]:
    """The JSON files of `kind` in `folder`, one for each GPU."""
    return sorted(folder.glob(f"{kind}_[a-z][0-9]*.json"))


def commit() -> str:
    """$SONICMOE_COMMIT, else the checked-out commit."""
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return os.environ.get("SONICMOE_COMMIT") or _first_line(head) or "unknown"


def _first_line(command: list[str]) -> str:
    """What a command prints first, or an empty string when it cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip().partition("\n")[0]


def where_and_when() -> dict[str, str]:
    """What every record of a run has in common: device, driver, limits, commit, date."""
    fields = {"device": "name", "driver": "driver_version", "power_limit": "power.limit"}
    query = ",".join(fields.values())
    gpu = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", str(_gpu())]
    values = _first_line(gpu).split(", ")
    known = len(values) == len(fields)
    return {
        **dict(zip(fields, values if known else ["unknown"] * len(fields), strict=True)),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "started": datetime.datetime.now().isoformat(timespec="seconds"),  # tells runs apart
    }


def versions() -> dict[str, str]:
    """Of torch, its CUDA and the packages an implementation is made of, as far as installed."""
    import torch

    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in PACKAGES[1:]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def measured_rates() -> dict[str, float]:
    """What this GPU sustains now: TFLOP/s of an 8192^3 bf16 product, TB/s read and written."""
    import torch

    def median_ms(call, runs: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    bf16 = {"device": "cuda", "dtype": torch.bfloat16}

    def product_ms(n: int) -> float:
        a, b, c = (torch.randn(n, n, **bf16) for _ in range(3))
        for _ in range(MATMUL_WARM):
            torch.mm(a, b, out=c)
        return median_ms(lambda: torch.mm(a, b, out=c), MATMUL_RUNS)

    def copy_ms(size: int) -> float:
        source = torch.randn(size // 2, **bf16)
        target = torch.empty_like(source)
        return median_ms(lambda: target.copy_(source), COPY_RUNS)

    rates = {
        "matmul_tflops": 2 * MATMUL_SIZE**3 / product_ms(MATMUL_SIZE) * 1e-9,
        "copy_tb_s": 2 * COPY_BYTES / copy_ms(COPY_BYTES) * 1e-9,
    }
    torch.cuda.empty_cache()
    return rates


class ClockSampler:
    """SM clock and board power, read every 20 ms by a thread; knows nothing without a driver.

    Power is the driver's average over about a second, the clock the moment's.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float]] = []  # time.time(), MHz, W

    def between(self, begin: float, end: float) -> dict[str, float]:
        """Medians of a span of `time.time()`: {"sm_mhz", "power_w"}, or nothing."""
        inside = [(mhz, watts) for t, mhz, watts in self.samples if begin <= t <= end]
        if not inside:
            return {}
        mhz, watts = (statistics.median(column) for column in zip(*inside, strict=True))
        return {"sm_mhz": mhz, "power_w": watts}


@contextlib.contextmanager
def sampled_clocks() -> Iterator[ClockSampler]:
    """A sampler at work until the context ends."""
    sampler, stop = ClockSampler(), threading.Event()

    def run() -> None:
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        handle, mhz, milliwatts = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(_gpu(), ctypes.byref(handle)):
            return
        while not stop.wait(SAMPLE_S):
            failed = nvml.nvmlDeviceGetClockInfo(handle, NVML_CLOCK_SM, ctypes.byref(mhz))
            failed |= nvml.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts))
            if not failed:
                sampler.samples.append((time.time(), mhz.value, milliwatts.value / 1e3))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield sampler
    finally:
        stop.set()
        thread.join()


def _gpu() -> int:
    """The driver's number of the first GPU that this process sees."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return int(first) if first.isdigit() else 0
