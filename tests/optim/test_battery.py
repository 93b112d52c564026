"""Every rule of `RULES` under every property; the counts and the exceptions are printed at the end of the run."""

import pytest

from optim import OPTIMIZERS, RULES
from tests.optim import properties, properties_ours
from tests.optim.specs import EVERYWHERE, EXCEPTIONS, SPECS

PROPERTIES = properties.PROPERTIES | properties_ours.PROPERTIES
NUMBERS = sorted([f"{n:02d}" for n in range(1, 37)] + [f"H{n}" for n in range(1, 10)])


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", sorted(RULES))
def test_property(name, number, record_property):
    record_property("battery", f"{name} {number}")
    reason = EXCEPTIONS.get((name, number), EXCEPTIONS.get((EVERYWHERE, number)))
    if reason is not None:
        record_property("excepted", reason)
        pytest.skip(f"exception: {reason}")
    PROPERTIES[number](SPECS[name])


def test_tables_are_complete():
    """Every rule has a spec and a class, every property a function or an exception, every exception a use."""
    assert set(SPECS) == set(RULES) == set(OPTIMIZERS)
    assert all(rule.name == name for name, rule in RULES.items())
    everywhere = {number for rule, number in EXCEPTIONS if rule == EVERYWHERE}
    assert set(NUMBERS) == set(PROPERTIES) | everywhere and not set(PROPERTIES) & everywhere
    assert {rule for rule, _ in EXCEPTIONS} <= {EVERYWHERE, *RULES} and {n for _, n in EXCEPTIONS} <= set(NUMBERS)
