"""One seed per purpose."""

from pipelines.runs.seeds import derive_seed


def test_seeds_are_separate_streams():
    seeds = {derive_seed(s, *n) for s in (0, 1) for n in [("a",), ("b",), ("a", 1), ("a", "1"), ("a1",), ()]}
    assert len(seeds) == 12 and all(0 <= s < 2**63 for s in seeds)
    assert (
        derive_seed(0, "warm-up") == 1671845863333336181
    )  # b2sum -l 64 of '[0, "warm-up"]', halved; seeds never change
