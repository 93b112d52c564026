"""Own moments on exact gradients: an oracle for small problems, more expensive than retraining."""

from __future__ import annotations

from typing import Any, ClassVar

from datatools.order.estimators.moments import Moments, precompute
from datatools.order.estimators.question import Question
from datatools.order.problem import HVP_IN_GRADIENTS, Cost, Problem
from datatools.order.reference_run import ReferenceRun


class OwnMoments(Moments):
    """`Moments` of g + H d at the closest anchor ("exact"): exact on quadratics with an anchor at every step.

    Its `precompute` returns a `Moments`, which is also what is saved.
    """

    name: ClassVar[str] = "own-moments"
    title: ClassVar[str] = "own moments on g + H d at the closest anchor: an oracle, more expensive than retraining"
    once: ClassVar[str] = "nothing beyond the reference run, with an anchor at every step"
    each: ClassVar[str] = "T gradients and Hessian-vector products"
    every_step: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = False

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Moments:
        """Call `moments.precompute` with exact gradients."""
        return precompute(reference, problem, hessian="exact", **options)

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """Return zero: everything is computed for each order."""
        return Cost()

    @classmethod
    def per_score(cls, question: Question) -> float:
        """Count a gradient and a product at every step."""
        return question.steps * (1 + HVP_IN_GRADIENTS) + question.held_out / 3

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """Return how products are computed."""
        return {"products": question.settings.products}
