"""Expert activations on fp32 scalars in registers: what the epilogues of `up` and `d_hidden` apply.

Legend: z pre-activation, g gate half, u up half of H, A activation, dA its gradient.

Gated: A = act(g) * u. Ungated: A = act(z) with z the only half. Names are those of
`sonicmoe_kernels.activations`, which holds the same functions in PyTorch.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

LOG2_E = 1.4426950408889634
SQRT_HALF = 0.7071067811865476
INV_SQRT_2PI = 0.3989422804014327


class Curve(NamedTuple):
    """Value and derivative of a scalar function at one point."""

    value: Float32
    slope: Float32


def silu(z: Float32) -> Curve:
    """z * sigmoid(z); exp2 and an approximate reciprocal (1 ulp), no division."""
    sigmoid = cute.arch.rcp_approx(1.0 + cute.arch.exp2(z * Float32(-LOG2_E)))
    value = z * sigmoid
    return Curve(value, sigmoid + value * (1.0 - sigmoid))


def gelu(z: Float32) -> Curve:
    """Exact GELU: z * Phi(z); its slope is Phi(z) + z * phi(z)."""
    cdf = 0.5 + 0.5 * cute.math.erf(z * Float32(SQRT_HALF))
    density = Float32(INV_SQRT_2PI) * cute.arch.exp2(z * z * Float32(-0.5 * LOG2_E))
    return Curve(z * cdf, cdf + z * density)


def relu(z: Float32) -> Curve:
    """max(z, 0)."""
    slope = cutlass.select_(z > 0.0, Float32(1.0), Float32(0.0))
    return Curve(cute.arch.fmax(z, Float32(0.0)), slope)


def relu2(z: Float32) -> Curve:
    """max(z, 0)^2."""
    positive = cute.arch.fmax(z, Float32(0.0))
    return Curve(positive * positive, 2.0 * positive)


def round_pair(low: Float32, high: Float32, dtype: type) -> Int32:
    """Two sums as the halves of a word, of bfloat16 or float16.

    In PTX, so that it happens where it is written: what a loop carries, the compiler would else
    round once more behind it, from registers that wgmma then writes, and wait for every wgmma.
    """
    half = "bf16" if dtype is cutlass.BFloat16 else "f16"
    return cute.arch.inline_ptx(
        f"cvt.rn.{half}x2.f32 {{$w0}}, {{$r1}}, {{$r0}};",
        write_only_types=[Int32],
        read_only_args=[low, high],
    )


CURVES = {"swiglu": silu, "geglu": gelu, "reglu": relu, "silu": silu, "relu2": relu2}


def activate(activation: str, halves: tuple[Float32, ...]) -> Float32:
    """A from (gate, up), or from (z,) when ungated."""
    value = CURVES[activation](halves[0]).value
    return value * halves[1] if len(halves) == 2 else value


class Gradients(NamedTuple):
    """A, and the gradient of every half of H."""

    a: Float32
    dh: tuple[Float32, ...]


def differentiate(activation: str, halves: tuple[Float32, ...], da: Float32) -> Gradients:
    """A and dH from H and dA: (dA u act'(g), dA act(g)) when gated, (dA act'(z),) when not."""
    value, slope = CURVES[activation](halves[0])
    if len(halves) == 2:
        return Gradients(value * halves[1], (da * halves[1] * slope, da * value))
    return Gradients(value, (da * slope,))
