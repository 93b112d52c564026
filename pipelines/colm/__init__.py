"""Coresets in the training loop."""
