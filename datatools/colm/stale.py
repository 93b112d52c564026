"""By-products of the training step that trained on a row last, used when the row is drawn again."""

from datatools.colm.feature import FeatureKind

STALE = FeatureKind(
    name="stale",
    title="by-products of the training step that had the row last: its gradient of the last value projection, its "
    "logits or its loss",
    cost="no pass; one small product per row while training",
    origin="visit",
    as_training=False,
)
"""A row that has not been trained on yet, or not within `coreset.stale_limit` steps, is drawn at random."""
