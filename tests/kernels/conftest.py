"""Names the compiler's target before any test imports cutlass, which reads it once."""

import os

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
