"""The training loop, its checkpoints, its evaluation, and its cost."""
