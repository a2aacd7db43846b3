"""The CuTe DSL kernels. Importing a module of this package imports cutlass: do it inside functions only,
after `sonicmoe_kernels.compile.prepare_dsl`, which names the target architecture to the compiler."""
