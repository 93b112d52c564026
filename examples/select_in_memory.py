"""Select rows for a target in memory: gradient features, influence, the best rows.

The pool has 60 rows of which the last 20 use the same tokens as the target. Run: python examples/select_in_memory.py
"""

import tempfile
from pathlib import Path

import tiny
import torch

from datatools import PROJECTORS, Candidates, GradientFeatures, aggregate, covered, extract, files, influence, select
from optim import SGDRule, UpdateMap, create
from pipelines.models.losses import row_losses


def keyed(rows):
    """Rows by their key, a digest of their content."""
    return {files.digest(row.numpy().tobytes()): row for row in rows}


pool = keyed(torch.cat([tiny.rows(40, high=90), tiny.rows(20, low=90, seed=1)]))
target = keyed(tiny.rows(4, low=90, seed=2))
model = tiny.model().eval()


def batch(rows):
    """Builds a function from keys of rows to a batch of the model."""
    return lambda keys: {"input_ids": (ids := torch.stack([rows[key] for key in keys])), "labels": ids}


# A warm-up gives the optimizer its state; here it is twelve steps on some rows of the pool.
names = covered(model, [name for name, parameter in model.named_parameters() if parameter.requires_grad])
optimizer = create("adamw", [(name, p) for name, p in model.named_parameters() if name in names], lr=3e-3)
for step in range(12):
    keys = list(pool)[step % 6 :: 6]
    row_losses(model, batch(pool)(keys)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def features(folder, rows, updates):
    """Writes one feature per row to a store in `folder`; the same call again continues one that was stopped."""
    projector = PROJECTORS["sjlt"].of({name: p.shape for name, p in updates.params.items()}, dim=512, seed=0)
    store = GradientFeatures.create_or_open(folder, meta={"model": "tiny", "step": 12}, dim=512, keys=list(rows))
    extract(store, model, row_losses, batch(rows), {key: len(row) for key, row in rows.items()}, updates, projector)
    return store


with tempfile.TemporaryDirectory() as scratch:
    of_pool = features(Path(scratch) / "pool", pool, UpdateMap.of(optimizer))  # the update AdamW would make
    of_target = features(Path(scratch) / "target", target, UpdateMap.of(optimizer, rules=SGDRule()))  # plain gradients
    similarity = influence([of_pool], [of_target], weights=[1e-3], keys=list(pool))

scores = aggregate(similarity, [0] * len(target), "mean")
chosen = select("top_k", Candidates(keys=list(pool), scores=scores), 10).indices.tolist()
print(f"{sum(i >= 40 for i in chosen)} of 10 selected rows are of the target's kind; 3.3 is what chance gives")
