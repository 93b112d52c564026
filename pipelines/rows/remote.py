"""Inputs at URLs (s3://, gs://, https://, ...): copied once to a folder on this machine, and read from there.

Rows are read several times and compared with what the run began with, so that a stable copy is needed. A copy is found
again by the URL and by what the server says about the file (size, ETag, time of change), which is asked every time: a
file that has changed is copied again, and a run that began with the other content then refuses it like any input that
has changed.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from datatools import DataError, DatatoolsError, EnvironmentProblem, UsageError, files
from pipelines.models.gguf import cache_folder
from pipelines.runs.progress import progress
from pipelines.settings import redaction
from pipelines.texts import first_line

PROTOCOLS = tuple("s3 s3a gs gcs az abfs abfss adl oss http https ftp sftp ssh hdfs webhdfs webdav dbfs".split())
"""The protocols that are read. fsspec has others, some of which run code or name files of this machine."""

_MARKS = ("size", "etag", "last-modified", "lastmodified", "mtime", "modified", "updated", "created", "md5", "crc32c",
          "generation", "versionid", "content-md5", "content_md5")  # fmt: skip
"""What servers say about a file that changes with its content, in small letters."""
_PIECE = 1 << 22


def copies(url: str, is_data: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """Return the files that a URL names, each with its own URL and its copy on this machine.

    Args:
        url: The URL of a file, of a folder, or of a pattern (*.jsonl).
        is_data: Whether a file of this name is taken out of a folder, or if a pattern also matches files of no known
            type.

    Returns:
        The files, sorted by URL; hidden files and files in hidden folders are left out.

    Raises:
        UsageError: The protocol is not read.
        EnvironmentProblem: A package is missing, or the server cannot be reached.
        DataError: There is no such file, or its copy has another size than the server says.
    """
    import fsspec

    protocol, shown = url.partition("://")[0].lower(), redaction.hide(url)
    if protocol not in PROTOCOLS:
        raise UsageError(f"{shown}: files are not read from {protocol}://; supported are {', '.join(PROTOCOLS)}")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise EnvironmentProblem(
            f"{shown}: needs a package that is not installed ({first_line(error)}); for s3:// and https://: "
            "pip install 'datatools-llm[remote]'"
        ) from error
    except Exception as error:  # of a library, for whatever is wrong with the URL or the settings of the server
        raise EnvironmentProblem(f"{shown}: cannot be opened: {first_line(error)}") from error
    try:
        found = _named(system, path, is_data)
    except FileNotFoundError as error:
        raise DataError(f"cannot read {shown}: there is no such file, or no such server; check the URL") from error
    except Exception as error:
        raise EnvironmentProblem(f"cannot read {shown}: {type(error).__name__}: {first_line(error)}") from error
    if not found:
        raise DataError(f"cannot read {shown}: it names no file; check the URL")
    return [(_url_of(url, system, name), _copy(system, name, about, url)) for name, about in sorted(found.items())]


def _named(system: Any, path: str, is_data: Callable[[str], bool]) -> dict[str, Mapping[str, Any]]:
    """Return the files that a path names: itself, those of a folder, or those that match."""
    pattern = any(c in path for c in "*[") or ("?" in path and not _is_http(system))
    if pattern:
        found = system.glob(path, detail=True)
    else:
        about = system.info(path)
        if about.get("type", "file") == "file":
            return {path: about}
        found = system.find(path, detail=True)
    top = len(path.split("*")[0].rpartition("/")[0] if pattern else path)
    seen = {
        name: about
        for name, about in found.items()
        if about.get("type", "file") == "file" and not any(p.startswith(".") for p in name[top:].split("/"))
    }
    data = {name: about for name, about in seen.items() if is_data(name)}
    return data or (seen if pattern else {})


def _is_http(system: Any) -> bool:
    protocol = system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)
    return "http" in protocol


def _url_of(url: str, system: Any, name: str) -> str:
    return name if "://" in name else str(system.unstrip_protocol(name)) if not _is_http(system) else url


def _copy(system: Any, name: str, about: Mapping[str, Any], url: str) -> Path:
    """Return the copy of a file, which is made if there is none of this version of it."""
    own = redaction.hide(_url_of(url, system, name))
    size = about.get("size")
    marks = sorted((str(key).lower(), str(value)) for key, value in about.items() if str(key).lower() in _MARKS)
    base = unquote(posixpath.basename(urlsplit(name).path.rstrip("/"))) if "://" in name else posixpath.basename(name)
    version = files.digest(repr((url.partition("://")[0], name, marks)).encode())
    base = base.replace("/", "_").replace("\0", "_")[-100:]  # decoded, it may hold what the URL had encoded
    place = cache_folder() / "inputs" / version / (base if base.strip(".") else "data")
    seal = place.with_name(place.name + ".seal.json")
    dated = any(key != "size" for key, _ in marks)  # otherwise another file of this size would pass for this one
    if dated and seal.is_file() and place.is_file() and files.read_json(seal)["xxh3"] == files.digest_file(place):
        return place
    files.make_folder(place.parent)
    copied = 0
    try:
        with progress(f"copying {own}", size, "bytes") as bar, files.atomic_path(place) as part:
            with system.open(name, "rb") as source, part.open("wb") as to:
                while piece := source.read(_PIECE):
                    to.write(piece)
                    copied += len(piece)
                    bar.advance(len(piece))
            if size is not None and copied != size:
                raise DataError(f"{own}: {copied:,} bytes arrived of {size:,}; run the command again")
    except DatatoolsError:
        raise
    except Exception as error:  # of the network, the server or the disk
        raise EnvironmentProblem(f"cannot copy {own}: {type(error).__name__}: {first_line(error)}") from error
    files.write_json(seal, {"url": own, "xxh3": files.digest_file(place)})
    return place
