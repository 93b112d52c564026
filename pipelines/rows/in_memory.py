"""Rows that a caller has in memory: data sets, data frames and lists of mappings, read like every other input.

    rows = held(dataset, "dataset")
    with lending({"pool": rows}):
        ...  # the input named `memory:pool` is these rows; row k is line k + 1
    rows.take([4, 0])  # of the caller's own type

A run writes them as JSONL into its folder, as it does for tables. If they are no longer in memory (`datatools explain`
on a run that was kept), that copy is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from datatools import UsageError

PREFIX = "memory:"
"""The beginning of the names of such inputs."""

_LENT: ContextVar[Mapping[str, Held]] = ContextVar("rows", default={})  # noqa: B039 (never written to)


class Held(ABC):
    """Rows of one caller: their number, each row as a mapping, and some of them in the caller's type."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    @abstractmethod
    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Any:
        """Return some rows in the caller's type.

        Args:
            indices: The numbers of the rows, in order.
        """

    @property
    def index(self) -> Any:
        """The index of a table about these rows; None for their numbers."""
        return None


class _Rows(Held):
    """A list or tuple of mappings, or anything else that has a length and gives them by number."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for number in range(len(self.given)):
            row = self.given[number]
            if not isinstance(row, Mapping):
                raise UsageError(f"row {number} is a {type(row).__name__}; expected a mapping from columns to values")
            yield row

    def take(self, indices: Sequence[int]) -> Any:
        found = [self.given[i] for i in indices]
        return tuple(found) if isinstance(self.given, tuple) else found


class _Dataset(Held):
    """A `datasets.Dataset`."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        yield from self.given.with_format(None)

    def take(self, indices: Sequence[int]) -> Any:
        return self.given.select(list(indices))


class _Frame(Held):
    """A `pandas.DataFrame`; what is missing in it is null."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        frame = self.given
        names = [str(name) for name in frame.columns]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"two columns of the data frame are called {twice!r}; rename one")
        plain = frame.astype(object).where(frame.notna(), None)
        for values in plain.itertuples(index=False, name=None):
            yield dict(zip(names, values, strict=True))

    def take(self, indices: Sequence[int]) -> Any:
        return self.given.iloc[list(indices)]

    @property
    def index(self) -> Any:
        return self.given.index


def held(given: Any, what: str) -> Held:
    """Return the rows in an object.

    Args:
        given: A `datasets.Dataset`, a `pandas.DataFrame`, a list or tuple of mappings, or another sequence of them.
        what: The name of the argument, for messages.

    Raises:
        UsageError: It is none of these, or empty; the message says how to make one.
    """
    found = _of_kind(given, what)
    if not len(found):
        raise UsageError(f"{what} has no row")
    return found


def _of_kind(given: Any, what: str) -> Held:
    kind = f"a {type(given).__module__.partition('.')[0]}.{type(given).__qualname__}"
    expected = f"{what} is {kind}; expected a datasets.Dataset, a pandas.DataFrame or a list of mappings"
    names = {f"{one.__module__.partition('.')[0]}.{one.__qualname__}" for one in type(given).__mro__}
    if "datasets.Dataset" in names:
        return _Dataset(given)
    if "pandas.DataFrame" in names:
        return _Frame(given)
    if "datasets.IterableDataset" in names or (hasattr(given, "__iter__") and not hasattr(given, "__len__")):
        raise UsageError(
            f"{expected}. Its rows come once, in a stream, and a selection reads them several times: take as many as "
            "you want scored, such as list(dataset.take(10_000)) or list(itertools.islice(rows, 10_000))"
        )
    if isinstance(given, Mapping):
        names_there = ", ".join(map(str, list(given)[:5]))
        raise UsageError(
            f"{expected}. Choose one of its parts ({names_there}), as in {what}[{next(iter(given), '')!r}]"
        )
    if isinstance(given, str | bytes) or not hasattr(given, "__getitem__") or not hasattr(given, "__len__"):
        raise UsageError(f"{expected}; files are selected from by `datatools select`")
    return _Rows(given)


def lent(name: str) -> Held | None:
    """Return the rows that are available under an input name in this context; None if there are none.

    Args:
        name: The name of the input, with `PREFIX`.
    """
    return _LENT.get().get(name)


@contextmanager
def lending(rows: Mapping[str, Held]) -> Iterator[None]:
    """Make rows available as the inputs `memory:NAME` inside the `with` block.

    Args:
        rows: NAME -> rows.
    """
    token = _LENT.set({**_LENT.get(), **{f"{PREFIX}{name}": one for name, one in rows.items()}})
    try:
        yield
    finally:
        _LENT.reset(token)
