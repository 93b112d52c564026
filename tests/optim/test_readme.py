"""The table of optimizers in the README says what the rules say of themselves."""

import re
from pathlib import Path

import pytest
import torch

from optim import OPTIMIZERS, RULES, backend, cpu_jit

README = Path(__file__).resolve().parents[2] / "optim" / "README.md"


def rows() -> dict[str, list[str]]:
    lines = README.read_text(encoding="utf-8").split("| name | source |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cell[0].strip("`"): cell[1:] for cell in cells}


ROWS = rows()


def test_the_table_has_every_optimizer():
    assert set(ROWS) == set(RULES) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", RULES)
def test_a_row_is_what_the_rule_says(name):
    source, state, elementwise, _, kernel = ROWS[name]
    rule, weight = RULES[name](), torch.empty(64, 64)
    assert elementwise == ("yes" if rule.elementwise else "no")
    text = rule.__doc__ or ""
    assert set(re.findall(r"\d{4}\.\d{5}", source)) <= set(re.findall(r"\d{4}\.\d{5}", text))
    if backend.use_cpu_jit():
        assert kernel.startswith("compiled") == (cpu_jit.supports(rule, weight) == "")
    told = re.match(r"[\d.]+(?=$|,| \()", state)
    if told and getattr(rule, "momentum", None) != 0.0:  # others are formulas
        held = sum(t.numel() * t.element_size() for t in rule.init(weight).values() if t.ndim > 0) / weight.numel()
        assert float(told[0]) <= held + 0.05 and int(held) >= int(float(told[0]))
