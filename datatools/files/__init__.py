"""The only package that writes files: each is written whole or not at all, and sealed in run folders.

`atomic.py` and `atomic_folders.py` write, `folders.py` creates, moves and removes, `locks.py` and `leases.py` lock, and
`reading.py` reads. In a run folder, finished files are sealed (`datatools.files.seals`), so a later read returns what
was written or fails. Nothing in this package follows a symbolic link when it writes, or waits for a named pipe: a link
in place of a file is replaced, and a linked folder inside a run folder is refused.

Failures are raised as `EnvironmentProblem` (no space, no permission, disk error, folder in use) or `DataError` (missing
or unreadable file), always with the path and a remedy. POSIX only: locks use `flock`, which the kernel releases when
the process that holds them dies. A network folder must support `flock`, `rename` and `fsync`.
"""

from datatools.files.atomic import (
    append_line,
    atomic_path,
    is_writing,
    json_bytes,
    write_bytes,
    write_json,
    write_new,
    write_pieces,
    write_text,
)
from datatools.files.atomic_folders import atomic_folder
from datatools.files.folders import (
    free_name,
    make_folder,
    move,
    remove,
    remove_folder,
    remove_leftovers,
    scratch_folder,
)
from datatools.files.leases import Leases
from datatools.files.locks import InUse, folder_mutex, holder, lock_folder
from datatools.files.problems import PathLike, explain
from datatools.files.reading import checked, digest, digest_file, open_file, read_bytes, read_json, seal_of, seal_once

__all__ = [
    "InUse", "Leases", "PathLike", "append_line", "atomic_folder", "atomic_path", "checked", "digest", "digest_file",
    "explain", "folder_mutex", "free_name", "holder", "is_writing", "json_bytes", "lock_folder", "make_folder", "move",
    "open_file", "read_bytes", "read_json", "remove", "remove_folder", "remove_leftovers", "scratch_folder", "seal_of",
    "seal_once", "write_bytes", "write_json", "write_new", "write_pieces", "write_text",
]  # fmt: skip
