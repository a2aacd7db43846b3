"""SonicMoE kernels and routing for PyTorch. Importing this compiles nothing and initialises no CUDA."""
