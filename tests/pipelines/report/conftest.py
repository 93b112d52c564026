"""A made-up run of a selection with LESS."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.report import select_page
from tests.pipelines.report.made_up import make_run


@pytest.fixture(scope="session")
def less(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("less")
    summary = make_run(folder)
    return folder, summary, select_page.render(folder).read_text(encoding="utf-8")
