"""See tests/reference/low_rank.py."""

from functools import partial

from tests.reference import low_rank

run = partial(low_rank.run, form="residual")
