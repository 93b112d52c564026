"""The comparison of optimizers (`tests.benchmarks.compare_optimizers`): rates of all rules, and what the table says."""

from optim import OPTIMIZERS
from tests.benchmarks.compare_optimizers import MIDDLE, Outcome, against, report, searched


def test_every_optimizer_has_a_learning_rate():
    assert set(OPTIMIZERS) - set(MIDDLE) == {"onebit_adam"}


def test_the_best_rate_runs_with_all_seeds_and_the_table_compares_equal_seeds(tmp_path, capsys):
    def outcomes(name, floor):
        def run(lr, seeds):
            return [Outcome(name, lr, s, floor + 0.01 * s + abs(lr - MIDDLE[name]), [], 0.002, 8.0) for s in seeds]

        return list(searched(name, run, 1, 3))

    found = outcomes("adamw", 2.5) + outcomes("soap", 2.3) + outcomes("sgd", 2.501)
    assert [o.seed for o in found if o.optimizer == "soap" and o.lr == MIDDLE["soap"]] == [0, 1, 2]
    report(tmp_path, found, 10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| soap | 2.31 | 2.30, 2.31, 2.32 | -0.200 (-0.200 to -0.200) | 0.01 | 2.0 | 8 |"), (
        lines[2]
    )
    assert "ahead of AdamW: soap" in lines
    assert "<b>-0.200 (-0.200 to -0.200)</b>" in (tmp_path / "report.html").read_text()


def test_ahead_means_more_than_the_spread_of_seeds():
    assert against({0: 2.0, 1: 2.3}, {0: 2.1, 1: 2.25}) == ("-0.025 (-0.978 to +0.928)", False)
    assert against({0: 2.0}, {0: 2.1}) == ("-0.100", False)
    text, ahead = against({0: 2.0, 1: 2.02, 2: 2.01}, {0: 2.1, 1: 2.11, 2: 2.12})
    assert ahead and text == "-0.100 (-0.125 to -0.075)"
    assert against({0: 2.0}, {0: 2.0}) == ("", False)
