"""The training loop, its checkpoints, its evaluation, and what it costs."""
