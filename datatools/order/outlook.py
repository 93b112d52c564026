"""Is there anything to win? The answer that estimates give before anything is retrained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from datatools.errors import UsageError
from datatools.stats import Numbers

DOUBT = 3.0
"""Factor by which an estimate without an error bar, or beyond the limits of `trust`, may be too small."""


@dataclass(frozen=True)
class Outlook:
    """What estimates expect of ordering.

    Attributes:
        spread: standard deviation of the estimated losses over random orders.
        gain: estimated loss of an average random order minus that of the best order that was found.
        most: the largest gain that the estimate allows for: two errors more, or `DOUBT` times as much where there is no
            error or no trust.
        worth: the smallest gain that is worth an order.

    Example:
        >>> outlook([1.0, 1.002, 0.998], 0.997, worth=0.1).worth_it
        False

    """

    spread: float
    gain: float
    most: float
    worth: float

    @property
    def worth_it(self) -> bool:
        """Whether a gain of `worth` is possible; True if estimates are not finite."""
        return not self.most < self.worth

    def sentence(self) -> str:
        """Describe the result in one sentence.

        Returns:
            The sentence.

        """
        said = (
            f"estimated losses differ by {self.spread:.2g} over random orders (standard deviation), and the best order "
            f"that was found gains {self.gain:.2g} over an average one"
        )
        if self.worth_it:
            return f"{said} (at most {self.most:.2g}); an order can matter"
        return f"{said}, at most {self.most:.2g}: less than {self.worth:g}, so there is nothing to win by ordering"


def outlook(drawn: Numbers, best: float, *, worth: float, error: float | None = None, trusted: bool = True) -> Outlook:
    """Compare the gain that estimates expect of the best order with the smallest gain that is worth an order.

    Args:
        drawn: estimated losses of random orders, at least two.
        best: estimated loss of the best order that was found.
        worth: the smallest gain that is worth an order.
        error: standard error of the gain; None or nan if unknown.
        trusted: whether the estimate is within the limits of `trust`.

    Returns:
        The result.

    Raises:
        UsageError: if there are fewer than two random orders.

    Example:
        >>> outlook([1.0, 2.0, 3.0], 0.5, worth=0.1).sentence()[:34]
        'estimated losses differ by 1 over '

    """
    if len(drawn) < 2:
        raise UsageError(f"order: the spread over {len(drawn)} random orders; it needs at least two")
    values = np.asarray(drawn, dtype=np.float64)
    gain = float(values.mean() - best)
    known = error is not None and math.isfinite(error) and trusted
    most = max(gain, 0.0) + 2 * float(error or 0.0) if known else DOUBT * max(gain, 0.0)
    if error is None and trusted:
        most = max(gain, 0.0)
    return Outlook(float(values.std(ddof=1)), gain, most, worth)
