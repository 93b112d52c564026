"""Linear maps from gradients to features. To add one, write a file in this folder and a line in `PROJECTORS`."""

from datatools.projectors.base import GENERATOR_VERSION, Projector
from datatools.projectors.factored import Factored
from datatools.projectors.identity import Identity
from datatools.projectors.rademacher import Rademacher
from datatools.projectors.sjlt import SJLT

PROJECTORS: dict[str, type[Projector]] = {
    "sjlt": SJLT,
    "factored": Factored,
    "rademacher": Rademacher,
    "identity": Identity,
}
"""Name -> projector class; `PROJECTORS[name].of(shapes, dim, seed)` creates a projector."""

__all__ = ["GENERATOR_VERSION", "PROJECTORS", "SJLT", "Factored", "Identity", "Projector", "Rademacher"]
