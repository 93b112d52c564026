"""Checks of settings. Each raises a ValueError that names the owner of the setting, the setting and its value."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any


def check_unit_interval(owner: str, **values: float) -> None:
    """Check that every value is a number with 0 <= value < 1.

    Args:
        owner: The name of the rule or function, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    _check(owner, values, lambda x: _is_number(x) and 0 <= x < 1, "a number with 0 <= {key} < 1")


def check_share(owner: str, **values: float) -> None:
    """Check that every value is a number with 0 <= value <= 1.

    Args:
        owner: The name of the rule or function, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    _check(owner, values, lambda x: _is_number(x) and 0 <= x <= 1, "a number with 0 <= {key} <= 1")


def check_positive_share(owner: str, **values: float) -> None:
    """Check that every value is a number with 0 < value <= 1.

    Args:
        owner: The name of the rule or function, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    _check(owner, values, lambda x: _is_number(x) and 0 < x <= 1, "a number with 0 < {key} <= 1")


def check_non_negative(owner: str, **values: float) -> None:
    """Check that every value is a finite number of at least 0.

    Args:
        owner: The name of the rule or function, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    _check(owner, values, lambda x: _is_number(x) and 0 <= x < math.inf, "a finite number of at least 0")


def check_positive(owner: str, **values: float) -> None:
    """Check that every value is a finite number above 0.

    Args:
        owner: The name of the rule or function, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    _check(owner, values, lambda x: _is_number(x) and 0 < x < math.inf, "a finite number above 0")


def check_counts(owner: str, **values: int) -> None:
    """Check that every value is an integer of at least 0.

    Args:
        owner: The name of the rule or function, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    _check(owner, values, lambda x: _is_integer(x) and x >= 0, "an integer of at least 0")


def check_positive_counts(owner: str, **values: int) -> None:
    """Check that every value is an integer of at least 1.

    Args:
        owner: The name of the rule or function, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    _check(owner, values, lambda x: _is_integer(x) and x >= 1, "an integer of at least 1")


def check_flag(owner: str, **values: bool) -> None:
    """Check that every value is True or False (the string "false" from a configuration would count as true).

    Args:
        owner: The name of the rule or function, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    _check(owner, values, lambda x: isinstance(x, bool), "True or False")


def check_choice(owner: str, choices: Collection[object], **values: object) -> None:
    """Check that every value is one of the choices.

    Args:
        owner: The name of the rule or function, for the message.
        choices: The values that are possible.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    _check(owner, values, lambda x: x in choices, "one of " + ", ".join(map(repr, choices)))


def checked_betas(owner: str, betas: Sequence[float]) -> tuple[float, float]:
    """Return the two betas as a tuple, after checking that they are two numbers with 0 <= beta < 1.

    Args:
        owner: The name of the rule, for the message.
        betas: The decay rates of the two running averages.

    Returns:
        The two betas as floats.

    Raises:
        ValueError: Unless they are two such numbers.
    """
    if not _is_list(betas) or len(betas) != 2:
        raise ValueError(f"{owner}: betas = {betas!r}; expected two numbers, such as (0.9, 0.999)")
    check_unit_interval(owner, **{f"betas[{i}]": beta for i, beta in enumerate(betas)})
    return float(betas[0]), float(betas[1])


def checked_three_betas(owner: str, betas: Sequence[float]) -> tuple[float, float, float]:
    """Return the three betas as a tuple, after checking that they are numbers with 0 <= beta < 1.

    Args:
        owner: The name of the rule, for the message.
        betas: The decay rates of three running averages, or of the first two.

    Returns:
        The three betas as floats; the third one is 0.9999 by default.

    Raises:
        ValueError: Unless they are two or three such numbers.
    """
    if not _is_list(betas) or len(betas) not in (2, 3):
        raise ValueError(f"{owner}: betas = {betas!r}; expected three numbers, such as (0.9, 0.999, 0.9999)")
    check_unit_interval(owner, **{f"betas[{i}]": beta for i, beta in enumerate(betas)})
    first, second, third = (*map(float, betas), 0.9999)[:3]
    return first, second, third


def _check(owner: str, values: Mapping[str, object], holds: Callable[[Any], bool], text: str) -> None:
    for key, value in values.items():
        if not holds(value):
            raise ValueError(f"{owner}: {key} = {value!r}; it must be {text.replace('{key}', key)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
