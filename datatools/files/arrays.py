"""Read arrays from an untrusted `.npz` file: without pickles, and with no more memory than the size of the file.

`np.load` trusts the headers: a member of a few bytes may unpack to gigabytes, or declare a shape of any size. Here,
members must be stored uncompressed, as datatools writes them, and each shape must match the number of bytes present.
"""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MEMBERS = 64


def read_npz(raw: bytes) -> dict[str, NDArray[Any]]:
    """Read the arrays of an `.npz` file.

    Args:
        raw: the content of the file.

    Returns:
        Member name (without `.npy`) -> array.

    Raises:
        ValueError: if `raw` is not an `.npz` file of uncompressed numeric or text arrays; the message gives the reason.

    Example:
        >>> raw = write_npz({"scores": np.array([0.5, 0.25])})
        >>> read_npz(raw)["scores"].tolist()
        [0.5, 0.25]

    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = archive.infolist()
            if len(members) > _MEMBERS or len({m.filename for m in members}) < len(members):
                raise ValueError(f"{len(members)} members, some with the same name; at most {_MEMBERS} are read")
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                    raise ValueError(f"{member.filename!r} is compressed; only uncompressed arrays are read")
            if sum(member.file_size for member in members) > len(raw):
                raise ValueError("its members overlap")
            return {member.filename.removesuffix(".npy"): _array(archive.read(member), member.filename)
                    for member in members}  # fmt: skip
    except ValueError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds of errors for malformed files
        raise ValueError(f"{type(error).__name__}: {error}") from error


def write_npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    """Serialize arrays as `np.savez` does, but without timestamps, so that equal arrays give equal bytes.

    Args:
        arrays: name -> array of numbers or text.

    Returns:
        The content of an `.npz` file.

    Example:
        >>> write_npz({"a": np.arange(3)}) == write_npz({"a": np.arange(3)})
        True

    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    return buffer.getvalue()


def _array(raw: bytes, name: str) -> NDArray[Any]:
    stream = io.BytesIO(raw)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"{name!r} has .npy version {version}; expected 1.0 or 2.0")
    shape, fortran, dtype = read(stream)
    if dtype.hasobject or dtype.kind not in "biufU" or dtype.itemsize == 0:
        raise ValueError(f"{name!r} holds {dtype}; expected numbers or text")
    rest = len(raw) - stream.tell()
    if math.prod(shape) * dtype.itemsize != rest:
        raise ValueError(f"{name!r} declares shape {shape} of {dtype}, but holds {rest} bytes")
    found: NDArray[Any] = np.frombuffer(raw, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    return found
