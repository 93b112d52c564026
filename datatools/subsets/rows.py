"""What herding and matching pursuit ask of their rows."""

from torch import Tensor


def check_rows(who: str, features: Tensor, k: int) -> None:
    """Refuse features that are not a finite [n, d], and a k that is not between 1 and n.

    Raises:
        ValueError: in the name of `who`.
    """
    if features.ndim != 2 or not features.isfinite().all():
        raise ValueError(f"{who}: features {list(features.shape)} must be finite, [n, d]")
    if not 1 <= k <= len(features):
        raise ValueError(f"{who}: k={k} of n={len(features)} rows; k must be between 1 and {len(features)}")
