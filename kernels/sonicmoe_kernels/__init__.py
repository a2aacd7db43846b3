"""SonicMoE kernels and routing for PyTorch: importing compiles nothing and initialises no CUDA."""
