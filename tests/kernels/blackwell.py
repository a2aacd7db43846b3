"""Compiles for Blackwell, in a process of its own: the compiler takes one target a process."""

from __future__ import annotations

import os
import subprocess
import sys

from sonicmoe_kernels import compile as kernel_cache

TIMEOUT_S = 180


def compile_for_blackwell(specs: str, *, imports: str = "") -> None:
    """Compile the kernels of an expression, which may name `tiles` and what `imports` imports."""
    program = (
        "from sonicmoe_kernels import compile as c, tiles\n"
        f"{imports}\n"
        f"for spec in {specs}:\n"
        "    c.compile_kernel(spec, arch='sm_100a')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, kernel_cache.ARCH_VARIABLE: "sm_100a"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
