"""The gate's product on tensor cores is as exact as a float32 one; `python -m` it for timings."""

import pytest
import torch
import torch.nn.functional as F

from sonicmoe_titan.float32_product import float32_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _inputs(B: int = 2, L: int = 4096, D: int = 1536, E: int = 128) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((B, L, D), (E, D), (B, L, E))
    x, weight, dlogits = (torch.randn(s, device="cuda", generator=generator) for s in shapes)
    return x.bfloat16(), (weight / D**0.5).bfloat16(), dlogits * 1e-3


def _gradients(run, x, weight, dlogits):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = run(x, weight)
    return logits, *torch.autograd.grad(logits, (x, weight), dlogits.to(logits.dtype))


def test_logits_and_gradients_are_those_of_float64_rounded_once():
    x, weight, dlogits = _inputs()
    logits, dx, dweight = _gradients(float32_product, x, weight, dlogits)
    exact = _gradients(F.linear, x.double(), weight.double(), dlogits)
    assert logits.dtype == torch.float32
    assert dx.dtype == dweight.dtype == torch.bfloat16
    assert (logits - exact[0]).abs().max() < 5e-5  # 1.3e-5 on an H100, 2026-11-22
    for actual, expected in zip((dx, dweight), exact[1:], strict=True):
        # half a unit in the last place of bf16, and what two bf16 halves lose of float32
        bound = 2.0**-8 * expected.abs() + 2.0**-15 * expected.abs().max()
        assert ((actual - expected).abs() <= bound).all()


def _kernel_ms(run, repeats: int = 20) -> float:
    """Kernel time of one run: eager launches take longer than these kernels do."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / repeats / 1e3


if __name__ == "__main__":
    x, weight, dlogits = _inputs(B=6)  # the 7B run's microbatch
    x.requires_grad_()
    weight.requires_grad_()

    def cast(x, weight):
        return F.linear(x.float(), weight.float())

    for name, product, tf32 in (
        ("tensor cores", float32_product, False),
        ("float32", cast, False),
        ("tf32", cast, True),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        run = lambda: torch.autograd.grad(product(x, weight), (x, weight), dlogits)  # noqa: B023, E731
        print(f"{name:12} {_kernel_ms(run):.3f} ms")
