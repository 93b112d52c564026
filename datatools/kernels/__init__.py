"""Triton kernels of datatools; `optim/kernels/README.md` has their bounds and costs beside those of `optim`."""
