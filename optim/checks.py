"""Range checks of hyper-parameters. Each raises a ValueError that names the rule, the setting and its value."""

from collections.abc import Sequence


def check_unit_interval(rule: str, **values: float) -> None:
    """Check that every value is a number with 0 <= value < 1.

    Args:
        rule: The name of the rule, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    for key, value in values.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise ValueError(f"{rule}: {key} = {value!r}; it must be a number with 0 <= {key} < 1")


def check_non_negative(rule: str, **values: float) -> None:
    """Check that every value is a finite number of at least 0.

    Args:
        rule: The name of the rule, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    for key, value in values.items():
        if not _is_number(value) or not 0 <= value < float("inf"):
            raise ValueError(f"{rule}: {key} = {value!r}; it must be a finite number of at least 0")


def check_positive(rule: str, **values: float) -> None:
    """Check that every value is a finite number above 0.

    Args:
        rule: The name of the rule, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    check_non_negative(rule, **values)
    for key, value in values.items():
        if value == 0:
            raise ValueError(f"{rule}: {key} = {value!r}; it must be above 0 (0 / 0 where there is no curvature)")


def check_counts(rule: str, **values: int) -> None:
    """Check that every value is an integer of at least 0.

    Args:
        rule: The name of the rule, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{rule}: {key} = {value!r}; it must be an integer of at least 0")


def check_flag(rule: str, **values: bool) -> None:
    """Check that every value is True or False (the string "false" from a configuration would count as true).

    Args:
        rule: The name of the rule, for the message.
        **values: The values, by the names of the settings.

    Raises:
        ValueError: For the first value that is not.
    """
    for key, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{rule}: {key} = {value!r}; it must be True or False")


def checked_betas(rule: str, betas: Sequence[float]) -> tuple[float, float]:
    """Return the two betas as a tuple, after checking that they are two numbers with 0 <= beta < 1.

    Args:
        rule: The name of the rule, for the message.
        betas: The decay rates of the two running averages.

    Returns:
        The two betas as floats.

    Raises:
        ValueError: Unless they are two such numbers.
    """
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"{rule}: betas = {betas!r}; expected two numbers, such as (0.9, 0.999)")
    check_unit_interval(rule, **{f"betas[{i}]": beta for i, beta in enumerate(betas)})
    return float(betas[0]), float(betas[1])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
