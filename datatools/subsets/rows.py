"""Checks that herding and matching pursuit share."""

from jaxtyping import Float
from torch import Tensor


def check_rows(who: str, features: Float[Tensor, " ..."], k: int) -> None:
    """Refuse features that are not finite or not [n, d], and a k that is not between 1 and n.

    Args:
        who: name of the function, for the message.
        features: floating dtype, of any shape.
        k: number of rows to choose.

    Raises:
        ValueError: in the name of `who`.

    """
    if features.ndim != 2 or not features.isfinite().all():
        raise ValueError(f"{who}: features {list(features.shape)} must be finite and have shape [n, d]")
    if not 1 <= k <= len(features):
        raise ValueError(f"{who}: k={k} of n={len(features)} rows; k must be between 1 and {len(features)}")
