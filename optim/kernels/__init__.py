"""Triton kernels, one per file: the definition in torch operations, the function that chooses, and the private kernel.

README.md has the table.
"""
