"""The time that the rest of a run takes, estimated from its parts and corrected by the parts that have finished."""

from collections.abc import Mapping


class Ahead:
    """The parts of a run that have not finished yet.

    The ratio of the measured time of finished parts to their estimates corrects the estimates of the other parts.

    Args:
        parts: Estimated seconds of each part, by the label of its progress.
    """

    def __init__(self, parts: Mapping[str, float]) -> None:
        self.parts = dict(parts)
        self._took = self._guessed = 0.0

    def finish(self, label: str, seconds: float) -> None:
        """Record that a part has finished.

        Args:
            label: The label of the part.
            seconds: How long the part took.
        """
        guess = self.parts.pop(label, None)
        if guess is not None:
            self._took, self._guessed = self._took + seconds, self._guessed + guess

    def left(self, label: str, seconds: float, share: float, eta: float | None) -> float:
        """Estimate the seconds until the end of the run.

        Args:
            label: The part that is running.
            seconds: How long this part has been running.
            share: The finished share of this part, from 0 to 1.
            eta: The seconds that this part still needs at its own rate; None if the rate is unknown.

        Returns:
            Seconds.
        """
        guess = self.parts.get(label, 0.0)
        took, guessed = self._took + seconds * (guess > 0), self._guessed + guess * share
        pace = min(10.0, max(0.1, took / guessed)) if guessed > 0 and took > 0 else 1.0
        here = eta if eta is not None else pace * guess * (1 - share)
        return here + pace * sum(value for name, value in self.parts.items() if name != label)
