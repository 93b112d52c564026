"""Benchmarks run only when asked for by name (`-m bench`): they take minutes and measure a quiet machine."""

from pathlib import Path

import pytest

from tests.benchmarks.measure import Settings

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = "bench" in config.getoption("markexpr").replace("not bench", "")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(7200))
            if not asked:
                item.add_marker(pytest.mark.skip(reason="a benchmark: run `make bench`, or pytest with -m bench"))


@pytest.fixture(scope="session")
def bench() -> Settings:
    return Settings.read()
