"""The instruction set of `make demo`; README.md in this folder describes it, and make.py writes it."""
