"""The memory that each value of an Arrow array takes as a Python object, computed without unpacking."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

CELL = 16  # minimum bytes of a value, as an object and as JSON
MOST = 1 << 40  # sizes are limited to this, so that sums stay below 2^63


def sizes(array: Any) -> NDArray[np.int64] | int:
    """Return a lower bound of the bytes of each value as a Python object or JSON; one number if all are equal.

    Nothing is unpacked: data that several values share counts for each of them.

    Args:
        array: An Arrow array.

    Cost:
        Linear in the memory of the array.
    """
    import pyarrow as pa

    is_a, kind = pa.types, array.type
    if isinstance(kind, pa.BaseExtensionType):
        return sizes(array.storage)
    if is_a.is_dictionary(kind):
        return _taken(sizes(array.dictionary), array.indices.fill_null(0).to_numpy(zero_copy_only=False))
    if is_a.is_run_end_encoded(kind):
        ends = array.run_ends.to_numpy()
        return _taken(sizes(array.values), np.searchsorted(ends, array.offset + np.arange(len(array)), side="right"))
    if is_a.is_struct(kind):
        return sum((sizes(array.field(i)) for i in range(kind.num_fields)), CELL)
    if is_a.is_union(kind):
        if kind.mode == "sparse":
            return sum((sizes(array.field(i)) for i in range(kind.num_fields)), CELL)
        here = slice(array.offset, array.offset + len(array))  # pyarrow's `type_codes` leave the offset out
        codes, offsets = (np.frombuffer(array.buffers()[i], form)[here] for i, form in ((1, "i1"), (2, "<i4")))
        found = np.zeros(len(array), np.int64)
        for i, code in enumerate(kind.type_codes):
            of_kind = codes == code
            found[of_kind] = _taken(sizes(array.field(i)), offsets[of_kind])
        return found + CELL
    if is_a.is_list_view(kind) or is_a.is_large_list_view(kind):
        first = array.offsets.to_numpy()
        return CELL + _between(sizes(array.values), first, first + array.sizes.to_numpy())
    if is_a.is_fixed_size_list(kind):
        first = (array.offset + np.arange(len(array), dtype=np.int64)) * kind.list_size
        return CELL + _between(sizes(array.values), first, first + kind.list_size)
    if is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_map(kind):
        inner = CELL + sizes(array.keys) + sizes(array.items) if is_a.is_map(kind) else sizes(array.values)
        offsets = array.offsets.to_numpy()
        return CELL + _between(inner, offsets[:-1], offsets[1:])
    if is_a.is_fixed_size_binary(kind):
        return CELL + int(kind.byte_width)
    return CELL + _lengths(array)


def _lengths(array: Any) -> NDArray[np.int64] | int:
    """Return the bytes of each text; 0 for values of fixed width."""
    import pyarrow as pa

    is_a, kind = pa.types, array.type
    if is_a.is_string_view(kind) or is_a.is_binary_view(kind):
        views = array.buffers()[1]
        if views is None:
            return 0
        return np.frombuffer(views, "<i4")[::4][array.offset : array.offset + len(array)].astype(np.int64)
    wide = is_a.is_large_string(kind) or is_a.is_large_binary(kind)
    if not wide and not is_a.is_string(kind) and not is_a.is_binary(kind):
        return 0
    offsets = array.buffers()[1]
    if offsets is None or not len(array):
        return 0
    found = np.frombuffer(offsets, "<i8" if wide else "<i4")[array.offset : array.offset + len(array) + 1]
    lengths: NDArray[np.int64] = found[1:].astype(np.int64) - found[:-1]
    return lengths


def _taken(values: NDArray[np.int64] | int, places: NDArray[Any]) -> NDArray[np.int64] | int:
    return values if isinstance(values, int) else values[places] if len(values) else 0


def _between(values: NDArray[np.int64] | int, first: NDArray[Any], last: NDArray[Any]) -> NDArray[np.int64]:
    """Return the sum of values[first:last] for each pair."""
    if isinstance(values, int):
        found = (last.astype(np.int64) - first) * float(values)
    else:
        sums = np.concatenate([[0], np.cumsum(np.minimum(values, MOST))])
        found = sums[last] - sums[first]
    cut: NDArray[np.int64] = np.minimum(found, MOST).astype(np.int64)
    return cut
