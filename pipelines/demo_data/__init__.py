"""The instruction set of `make demo`; README.md beside this file describes it, make.py writes it."""
