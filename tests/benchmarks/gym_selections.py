"""Which selection trains best on tasks that a program makes? Twenty families of reasoning-gym, six of them targets.

    pip install 'datatools-llm[gym]'
    python -m tests.benchmarks.gym_selections --out runs/gym
    python -m tests.benchmarks.gym_selections --model ../shared/data/models/stories260k --chat tulu \
        --learning-rate 2e-3 --epochs 4 --out runs/gym-stories

Everything is as in `compare_selections`, with other rows: a pool with equally many questions of each family, target
rows and held-out rows of one family from other seeds, which share no question with the pool. Answers are judged by the
family's own checker. Beside losses and accuracy, the tables show which share of the chosen rows is of the target's
family, and which of other families of its kind. reasoning-gym is needed for this benchmark alone.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tests.benchmarks.compare_selections import Problem, arguments, compare

KINDS = {
    "sums": ("chain_sum", "basic_arithmetic", "decimal_chain_sum", "products"),
    "divisors": ("gcd", "lcm", "fraction_simplification", "prime_factorization"),
    "letters": ("spell_backward", "letter_counting", "word_sorting", "caesar_cipher"),
    "logic": ("syllogism", "knights_knaves", "family_relationships", "aiw"),
    "time": ("calendar_arithmetic", "time_intervals"),
    "stories": ("gsm_symbolic", "leg_counting"),
}
TARGETS = ("chain_sum", "gcd", "spell_backward", "syllogism", "calendar_arithmetic", "gsm_symbolic")
POOL, WANTED, TESTS = 0, 1, 2
"""The parts of a family, whose questions have different seeds."""


class Family:
    """One family of tasks, with distinct questions.

    Args:
        name: Its name in reasoning-gym.
        seed: Of all its parts.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self._asked = set[str]()
        self._entries: dict[str, dict[str, Any]] = {}
        self._made: Any = None

    def rows(self, part: int, count: int) -> list[dict[str, Any]]:
        """Make rows of one part; a question that another part has is left out."""
        import reasoning_gym

        # more than are needed, because small families repeat questions
        self._made = reasoning_gym.create_dataset(self.name, seed=3 * self.seed + part, size=20 * count)
        found: list[dict[str, Any]] = []
        for number, entry in enumerate(self._made):
            question, answer = entry["question"].strip(), str(entry["answer"]).strip()
            if question in self._asked or not answer:
                continue
            self._asked.add(question)
            identity = f"{self.name}-{part}-{number}"
            self._entries[identity] = entry
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            found.append({"dataset": self.name, "id": identity, "messages": turns, "answer": answer})
            if len(found) == count:
                break
        return found

    def right(self, identity: str, text: str) -> bool:
        """Return whether an answer is right, by the checker of the family; partly right is wrong."""
        return bool(self._made.score_answer(text.strip(), self._entries[identity]) == 1)


def gym(options: argparse.Namespace) -> Problem:
    """Write the pool and the targets to files, which are the same for the same seed and version of reasoning-gym."""
    families = {name: Family(name, options.data_seed) for kind in KINDS.values() for name in kind}
    folder = Path(options.out) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    pool = [row for family in families.values() for row in family.rows(POOL, options.rows_per_family)]
    random.Random(options.data_seed).shuffle(pool)
    parts = {"pool": pool}
    for name in TARGETS:
        parts[f"{name}-wanted"] = families[name].rows(WANTED, options.target_rows)
        parts[f"{name}-tests"] = families[name].rows(TESTS, options.test_rows)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def sources(target: str) -> tuple[set[str], set[str]]:
        kind = next(names for names in KINDS.values() if target in names)
        return {target}, set(kind) - {target}

    def right(identity: str, text: str) -> bool:
        return families[identity.partition("-")[0]].right(identity, text)

    return Problem(
        pool=folder / "pool.jsonl",
        metrics=dict.fromkeys(TARGETS, "exact"),
        wanted=lambda target: folder / f"{target}-wanted.jsonl",
        held_out=lambda target: folder / f"{target}-tests.jsonl",
        sources=sources,
        extract="whole",
        right=right,
    )


def main() -> None:
    """Compare on tasks of reasoning-gym."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--rows-per-family", type=int, default=50)
    parser.add_argument("--target-rows", type=int, default=12)
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--out", default="runs/gym-selections")
    options = parser.parse_args()
    compare(gym, options)


if __name__ == "__main__":
    main()
