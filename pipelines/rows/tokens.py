"""The tokens of a pool: every row is encoded once, and its tokens are kept on disk for all stages of a run.

They are in the parts of the pool's index (`pipelines.rows.part`). Every row's tokens are compared with its content key,
so that damaged or missing ones are noticed; their rows are encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.rows.encoded import IGNORED, Encoded
from pipelines.rows.part import TokenFile
from pipelines.rows.scan import Scan


class Tokens:
    """The kept tokens of a pool.

    Args:
        files: The file of tokens of each part.
        sizes: The number of rows of each part.
        scan: The result of encoding the pool.
    """

    def __init__(self, files: Sequence[Path], sizes: Sequence[int], scan: Scan) -> None:
        self.folder = files[0].parent
        """The folder of the files."""
        self._files = [TokenFile.of(path) for path in files]
        self._starts = np.cumsum([0, *sizes])
        self._scan = scan

    def row(self, index: int) -> Encoded | None:
        """Return the tokens of a row; None if they are missing or damaged.

        Args:
            index: The number of the row.
        """
        if not self._scan.ok[index]:
            return None
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, count = self._files[part], int(self._scan.tokens[index])
        if file is None:
            return None
        found, loss = file.row(index - int(self._starts[part]), count)
        if len(found) != 4 * count or len(loss) != count:
            return None
        ids = np.frombuffer(found, "<i4")
        labels = np.where(np.frombuffer(loss, np.uint8) != 0, ids, IGNORED)
        row = Encoded(ids.tolist(), labels.tolist(), int(self._scan.cut[index]))
        return row if row.key == self._scan.keys[index] else None
