"""Running the examples of docstrings: what tests of all packages do with a `doctest.DocTest`."""

import doctest
import warnings

import torch


def failures(test: doctest.DocTest) -> str:
    """What the examples that print something else than they say have printed; "" if there are none.

    Warnings are not shown, and the global random numbers are as before afterwards.
    """
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner.run(test, out=said.append)
    return "".join(said)
