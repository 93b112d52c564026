"""`datatools report DIR` draws what is there, or says what is not."""

import pytest

from datatools import DataError, UsageError
from pipelines import pages


def test_folders_without_a_report_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        pages.draw(tmp_path / "none")
    with pytest.raises(UsageError, match="run.yaml is missing"):
        pages.draw(tmp_path)
    (tmp_path / "run.yaml").write_text("seed: 0\n")
    with pytest.raises(DataError, match=r"nothing to draw yet.*summary.json.*validation.json"):
        pages.draw(tmp_path)


@pytest.mark.parametrize("name", pages.KINDS)
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("{")
    with pytest.raises(DataError, match=name):
        pages.draw(tmp_path)
