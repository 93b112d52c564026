"""How long the rest of a run takes, from the estimates of its parts and from how long the finished ones took."""

from collections.abc import Mapping


class Ahead:
    """What is still to come in a run.

    The ratio of the time that finished parts took to their estimates corrects the estimates of the others.

    Args:
        parts: estimated seconds of each part, by the label of its progress.

    """

    def __init__(self, parts: Mapping[str, float]) -> None:
        self.parts = dict(parts)
        self._took = self._guessed = 0.0

    def finish(self, label: str, seconds: float) -> None:
        """Record that the part `label` is over and took `seconds`."""
        guess = self.parts.pop(label, None)
        if guess is not None:
            self._took, self._guessed = self._took + seconds, self._guessed + guess

    def left(self, label: str, seconds: float, share: float, eta: float | None) -> float:
        """Estimate the seconds to the end of the run.

        Args:
            label: the part that runs now.
            seconds: how long it has run.
            share: how much of it is done, from 0 to 1.
            eta: what its own rate says is left of it, in seconds.

        """
        guess = self.parts.get(label, 0.0)
        took, guessed = self._took + seconds * (guess > 0), self._guessed + guess * share
        pace = min(10.0, max(0.1, took / guessed)) if guessed > 0 and took > 0 else 1.0
        here = eta if eta is not None else pace * guess * (1 - share)
        return here + pace * sum(value for name, value in self.parts.items() if name != label)
