"""Triton kernels, one per file: the definition in torch operations, the function that launches it, and the kernel.

README.md has the table.
"""
