"""One seed per purpose, derived from the seed that the user gives."""

import hashlib
import json


def derive_seed(seed: int, *names: str | int) -> int:
    """Return the seed for one purpose, such as `("warmup", "rows")`.

    Args:
        seed: The seed of the run.
        *names: The purpose. Different purposes give unrelated seeds.

    Returns:
        63 bits of BLAKE2b over `seed` and `names`.

    Example:
        >>> derive_seed(0, "lora") == derive_seed(0, "lora") != derive_seed(0, "warmup")
        True
    """
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
