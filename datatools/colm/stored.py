"""Features that were computed before training, by `datatools select` or by a pass over all rows now and then."""

from datatools.colm.feature import FeatureKind

STORED = FeatureKind(
    name="stored",
    title="features that `datatools select` has written, or that are measured every `coreset.refresh_every` steps",
    cost="no pass over the large batch; a refresh is one forward pass over all rows of the data",
    origin="store",
    as_training=False,
)
"""What changes while the model trains is not seen before the next refresh."""
