"""Coresets in a training loop in plain PyTorch: large batches are read, the rows that stand for them are trained on.

Run: python examples/coreset_loop.py
"""

import tiny
import torch

from datatools import CoLM, small_sources
from pipelines.models.losses import row_losses

model = tiny.model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
sources = ["web"] * 24 + ["maths"] * 6 + ["code"] * 2  # of the 32 rows of each large batch
loader = [{"input_ids": (ids := tiny.rows(32, seed=step)), "labels": ids} for step in range(3)]

colm = CoLM(model, row_losses, keep=16, small=small_sources({"web": 5_000, "maths": 300, "code": 40}), seed=0)
for step, batch in enumerate(loader):
    chosen = colm(batch, sources, step=step, watch=True)
    kept = {name: tensor[chosen.indices] for name, tensor in batch.items()}
    loss = (row_losses(model, kept) * chosen.weights).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ours, chance = colm.last.match_error, colm.last.match_error_random
    print(
        f"step {step}: loss {loss.item():.3f}, error of the kept rows' gradient {ours:.3f}, of random rows {chance:.3f}"
    )
