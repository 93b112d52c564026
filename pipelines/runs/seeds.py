"""One seed per purpose, derived from the one that the user gives."""

import hashlib
import json


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed for one purpose, such as `("warmup", "rows")`.

    Args:
        seed: the run's seed.
        names: the purpose; another purpose gives an unrelated seed.

    Returns:
        63 bits of blake2b over `seed` and `names`.

    Example:
        >>> derive_seed(0, "lora") == derive_seed(0, "lora") != derive_seed(0, "warmup")
        True

    """
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
