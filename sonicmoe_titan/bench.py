"""`sonicmoe bench CONFIG`: time the experts of one MoE layer of a run on this machine.

Legend: T tokens of a microbatch, D model width, F expert width, E experts, K experts per token.
"""

import statistics
import time

import torch
from sonicmoe_kernels.backends import resolve_backend
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan
from torch import Tensor

from sonicmoe_titan.check import load_checked
from sonicmoe_titan.run_kernels import local_sizes
from sonicmoe_titan.run_sizes import microbatch_tokens
from sonicmoe_titan.toml_config import Command

USAGE = "usage: sonicmoe bench CONFIG [--KEY VALUE ...]"
FLOPS_FORWARD, FLOPS_STEP = 6, 18  # times T K D F
ROUNDS = 5
SECONDS_PER_ROUND = 0.5


def main(argv: list[str]) -> int:
    """Print forward and forward+backward times of the backends that run here; balanced routing."""
    config = load_checked(Command.parse(argv, usage=USAGE), num_processes=None)
    model, T = config.model, microbatch_tokens(config)
    F, E = local_sizes(config)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    chosen = resolve_backend("auto", device, dtype, model.dim, F)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    print(f"T {T}  D {model.dim}  F {F}  E {E}  K {model.top_k}  {dtype}  {name}")
    unit = T * model.top_k * model.dim * F / 1e12
    for backend in dict.fromkeys((chosen, "torch")):
        forward, step = _time_backend(backend, T, model.dim, F, E, model.top_k, device, dtype)
        print(
            f"{backend:8} forward {forward * 1e3:9.3f} ms ({FLOPS_FORWARD * unit / forward:7.2f} "
            f"TFLOP/s)   forward+backward {step * 1e3:9.3f} ms "
            f"({FLOPS_STEP * unit / step:7.2f} TFLOP/s)"
        )
    return 0


def _time_backend(
    backend: str, T: int, D: int, F: int, E: int, K: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Median seconds of a forward pass and of a forward with its backward pass."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        values = torch.randn(shape, device=device, dtype=torch.float32, generator=generator)
        return values.mul_(scale).to(dtype).requires_grad_()

    x_TD = normal(T, D, scale=1.0)
    w1_EFD, w3_EFD = normal(E, F, D, scale=D**-0.5), normal(E, F, D, scale=D**-0.5)
    w2_EDF = normal(E, D, F, scale=F**-0.5)
    first_T1 = torch.arange(T, device=device)[:, None] * K
    ids_TK = (first_T1 + torch.arange(K, device=device)) % E
    scores_TK = torch.full((T, K), 1 / K, device=device, requires_grad=True)
    plan = RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=E)
    dout_TD = torch.randn(T, D, device=device, generator=generator).to(dtype)
    inputs = (x_TD, w1_EFD, w3_EFD, w2_EDF, scores_TK)

    def forward() -> Tensor:
        return moe_experts(x_TD, w1_EFD, w3_EFD, w2_EDF, plan, backend=backend)

    def step() -> None:
        torch.autograd.grad(forward(), inputs, dout_TD, retain_graph=True)

    return _median_seconds(forward, device), _median_seconds(step, device)


def _median_seconds(call: object, device: torch.device) -> float:
    """Median over rounds of the mean time of a call in a loop, after a warm-up call."""
    assert callable(call)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    call()
    rounds = []
    for _ in range(ROUNDS):
        wait()
        started, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - started < SECONDS_PER_ROUND:
            call()
            calls += 1
            if device.type == "cuda" and calls % 10 == 0:
                wait()
        wait()
        rounds.append((time.perf_counter() - started) / calls)
    return statistics.median(rounds)
