"""Triton kernels, one a file: the definition in torch operations, the function that chooses, the private kernel.

`optim.backend.use_triton` says when a kernel runs; README.md says what bounds each and what it should cost.
"""
