"""The table that the battery runs over: one `OptimSpec` per rule, and the exceptions with their reasons.

To put a new optimizer under all properties of `tests/optim/properties*.py`: write ``tests/reference/<name>.py``
(float64 numpy, from the paper) and add an entry to the file here that fits. Nothing else.
"""

from tests.optim.spec import OptimSpec
from tests.optim.specs_blocks import BLOCKS
from tests.optim.specs_compressed import COMPRESSED
from tests.optim.specs_curvature import CURVATURE
from tests.optim.specs_elementwise import ELEMENTWISE
from tests.optim.specs_kronecker import KRONECKER, KRONECKER_EXCEPTIONS
from tests.optim.specs_matrices import MATRIX_RULES
from tests.optim.specs_suite import SUITE, SUITE_EXCEPTIONS

SPECS: dict[str, OptimSpec] = {
    spec.name: spec for spec in (*ELEMENTWISE, *BLOCKS, *MATRIX_RULES, *CURVATURE, *COMPRESSED, *SUITE, *KRONECKER)
}

ORACLE_DECAY = dict.fromkeys(("sgd", "rmsprop", "adagrad", "signsgd"), 0.0)  # theirs is coupled; 0.1 for the others

EVERYWHERE = "*"

EXCEPTIONS: dict[tuple[str, str], str] = (
    SUITE_EXCEPTIONS
    | KRONECKER_EXCEPTIONS
    | {
        ("adahessian", "26"): "the published code has no step without curvature; held with it by test_curvature.py",
        ("lion_8bit", "H9"): "it is not, but signs seldom show how the momentum was rounded; adamw_8bit does",
        ("apollo", "06"): "a parameter's number in its group decides on its random bases: alone it has others",
        (
            "apollo",
            "26",
        ): "torch's generators draw the published bases; golden cases hold it with those that were drawn",
    }
)
"""(rule or EVERYWHERE, property) -> why it is not held. Printed at the end of the run."""
