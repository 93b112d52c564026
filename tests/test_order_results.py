"""The page of results shows what the kept runs of orders give."""

from datatools import files
from tests.benchmarks.compare_orders import BEST, FOUND, RANDOM, of_seed, table
from tests.conftest import REPOSITORY


def test_the_page_has_the_tables_of_the_kept_orders() -> None:
    runs = files.read_json(REPOSITORY / "tests/benchmarks/results/orders/results.json")["runs"]
    page = (REPOSITORY / "docs/pages/reference/results.md").read_text()
    for case in dict.fromkeys(run["case"] for run in runs):
        for line in table(runs, case):
            assert line in page


def test_the_best_random_order_is_chosen_without_its_test_loss() -> None:
    losses = {"random 1": (1.0, 5.0), "random 2": (2.0, 3.0), FOUND[1]: (0.5, 4.0)}
    runs = [{"case": "c", "seed": 0, "arm": arm, "dev": dev, "test": test} for arm, (dev, test) in losses.items()]
    assert of_seed(runs, BEST, "test") == 5.0 and of_seed(runs, RANDOM, "test") == 4.0
    assert of_seed(runs, BEST, "retrainings") == 2.0
