"""The only package that writes files: whole or not at all, and sealed in run folders.

`atomic.py` writes (and says how), `folders.py` makes, moves and removes, `locks.py` locks, `reading.py` reads. In a run
folder, finished files are sealed (`datatools.files.seals`): what is read there later is what was written. Nothing here
follows a link to write, or waits for a pipe: a name that is taken by a link is replaced, and a folder inside a run
folder that is a link is refused.

Failures surface as `EnvironmentProblem` (no space, no permission, disk error, folder in use) or `DataError` (no such
file, not a readable file), always with the path and what to do. POSIX only: locks are `flock`, which the kernel drops
when its holder dies; a network folder must support `flock`, `rename` and `fsync`.
"""

from datatools.files.atomic import (
    append_line,
    atomic_folder,
    atomic_path,
    is_writing,
    json_bytes,
    write_bytes,
    write_json,
    write_new,
    write_pieces,
    write_text,
)
from datatools.files.folders import make_folder, move, remove, remove_folder, remove_leftovers, scratch_folder
from datatools.files.locks import folder_mutex, lock_folder
from datatools.files.problems import PathLike, explain
from datatools.files.reading import checked, digest, digest_file, open_file, read_bytes, read_json, seal_of, seal_once

__all__ = [
    "PathLike", "append_line", "atomic_folder", "atomic_path", "checked", "digest", "digest_file", "explain",
    "folder_mutex", "is_writing", "json_bytes", "lock_folder", "make_folder", "move", "open_file", "read_bytes",
    "read_json", "remove", "remove_folder", "remove_leftovers", "scratch_folder", "seal_of", "seal_once",
    "write_bytes", "write_json", "write_new", "write_pieces", "write_text",
]  # fmt: skip
