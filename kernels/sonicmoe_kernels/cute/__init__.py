"""The CuTe DSL kernels.

A module of this package imports cutlass, which reads CUTE_DSL_ARCH once: import it inside functions
only, after `sonicmoe_kernels.compile.prepare_dsl`.
"""
