"""A table of features by row number, with the step at which each was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.errors import DataError

NEVER = -1


class FeatureTable:
    """Features of numbered rows. A row that was never measured, or too long ago, has none.

    Memory: 4 bytes x rows x dim, on the CPU, once the first features are known.

    Args:
        numbers: the row numbers, unique.
        limit: largest age of a feature in steps; None is no limit.

    Attributes:
        numbers: the row numbers, in the order of the table.
        limit: as given.

    Example:
        >>> table = FeatureTable([10, 20], limit=5)
        >>> table.put([20], torch.ones(1, 2), step=0)
        >>> table.take([10, 20], step=5)
        tensor([[nan, nan],
                [1., 1.]])
        >>> table.take([10, 20], step=6).isfinite().any()
        tensor(False)

    """

    def __init__(self, numbers: Sequence[int], limit: int | None = None) -> None:
        self.numbers, self.limit = list(numbers), limit
        self._place = {number: place for place, number in enumerate(self.numbers)}
        self._features = torch.zeros(len(self.numbers), 0)
        self._step = torch.full((len(self.numbers),), NEVER)

    def __len__(self) -> int:
        return len(self.numbers)

    def put(self, numbers: Sequence[int], features: Float[Tensor, "n d"], *, step: int) -> None:
        """Set the features of some rows. Rows whose features are not finite keep what they have.

        Args:
            numbers: the row numbers [n].
            features: floating dtype [n, d]; d is the same in all calls.
            step: the step at which they were measured.

        Raises:
            ValueError: if d differs from that of earlier calls.

        """
        if self._features.shape[1] == 0:
            self._features = torch.zeros(len(self), features.shape[1])
        if features.shape != (len(numbers), self._features.shape[1]):
            raise ValueError(f"features {list(features.shape)} for {len(numbers)} rows of a table of width "
                             f"{self._features.shape[1]}")  # fmt: skip
        found = features.detach().float().cpu()
        good = found.isfinite().all(1)
        places = torch.tensor([self._place[number] for number in numbers], dtype=torch.int64)[good]
        self._features[places] = found[good]
        self._step[places] = step

    def take(self, numbers: Sequence[int], *, step: int) -> Float[Tensor, "n d"]:
        """Return the features of some rows; NaN for rows that have none.

        Args:
            numbers: the row numbers [n].
            step: the present step, from which the age of features counts.

        Returns:
            float32 [n, d]; d is 1 before the first features are known.

        """
        places = torch.tensor([self._place[number] for number in numbers], dtype=torch.int64)
        measured = self._step[places]
        known = measured != NEVER
        if self.limit is not None:
            known &= step - measured <= self.limit
        if self._features.shape[1] == 0:
            return torch.full((len(places), 1), torch.nan)
        return torch.where(known[:, None], self._features[places], torch.nan)

    def ages(self, numbers: Sequence[int], *, step: int) -> list[int]:
        """Return the ages, in steps, of the features that some rows have.

        Args:
            numbers: the row numbers.
            step: the present step.

        Returns:
            One age per row with a feature, whatever the limit.

        """
        measured = self._step[torch.tensor([self._place[number] for number in numbers], dtype=torch.int64)]
        return [step - at for at in measured.tolist() if at != NEVER]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the contents of the table.

        Returns:
            `numbers`, int64 [rows]; `features`, float32 [rows, d]; `step`, int64 [rows].

        """
        return {"numbers": torch.tensor(self.numbers), "features": self._features, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore saved contents.

        Args:
            state: result of `state_dict`.

        Raises:
            DataError: if they belong to other rows.

        """
        if sorted(state) != ["features", "numbers", "step"] or state["numbers"].tolist() != self.numbers:
            raise DataError("coreset: the saved features belong to other rows; train again, or restore the data")
        self._features, self._step = state["features"].float(), state["step"]
