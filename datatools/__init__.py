"""Data tools for language-model training: gradient features, influence scores, selection.

Takes tensors and loss functions; knows no model class and no tokenizer. Names are imported on first use, so that
`datatools.files` and `datatools.errors` cost no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datatools import order as order
    from datatools.budget import Budget as Budget
    from datatools.coresets import CORESET_METHODS as CORESET_METHODS
    from datatools.coresets import CoLM as CoLM
    from datatools.coresets import LastLayer as LastLayer
    from datatools.coresets import cluster_sources as cluster_sources
    from datatools.coresets import kept_by_source as kept_by_source
    from datatools.coresets import matching_error as matching_error
    from datatools.coresets import not_better as not_better
    from datatools.coresets import select_batch as select_batch
    from datatools.coresets import small_sources as small_sources
    from datatools.correlations import spearman as spearman
    from datatools.encodings import ENCODINGS as ENCODINGS
    from datatools.errors import DataError as DataError
    from datatools.errors import DatatoolsError as DatatoolsError
    from datatools.errors import EnvironmentProblem as EnvironmentProblem
    from datatools.errors import UsageError as UsageError
    from datatools.errors import did_you_mean as did_you_mean
    from datatools.features import batch_rows as batch_rows
    from datatools.features import extract as extract
    from datatools.gradients import covered as covered
    from datatools.gradients import per_sample_grads as per_sample_grads
    from datatools.gradients import token_batches as token_batches
    from datatools.gradients import visit_per_sample_grads as visit_per_sample_grads
    from datatools.memory import keep_pages as keep_pages
    from datatools.orders import Order as Order
    from datatools.projectors import PROJECTORS as PROJECTORS
    from datatools.projectors import Projector as Projector
    from datatools.scores import AGGREGATIONS as AGGREGATIONS
    from datatools.scores import aggregate as aggregate
    from datatools.scores import influence as influence
    from datatools.scores import influence_paper as influence_paper
    from datatools.scores import subtask_means as subtask_means
    from datatools.scores import subtask_targets as subtask_targets
    from datatools.selection import Candidates as Candidates
    from datatools.selection import Selection as Selection
    from datatools.selectors import SELECTORS as SELECTORS
    from datatools.selectors import select as select
    from datatools.store import GradientFeatures as GradientFeatures
    from datatools.store import OtherFeatures as OtherFeatures

# public name -> the module that defines it
_EXPORTS = {
    "spearman": "datatools.correlations",
    "CORESET_METHODS": "datatools.coresets",
    "CoLM": "datatools.coresets",
    "LastLayer": "datatools.coresets",
    "cluster_sources": "datatools.coresets",
    "kept_by_source": "datatools.coresets",
    "matching_error": "datatools.coresets",
    "not_better": "datatools.coresets",
    "select_batch": "datatools.coresets",
    "small_sources": "datatools.coresets",
    "ENCODINGS": "datatools.encodings",
    "DataError": "datatools.errors",
    "DatatoolsError": "datatools.errors",
    "EnvironmentProblem": "datatools.errors",
    "UsageError": "datatools.errors",
    "did_you_mean": "datatools.errors",
    "extract": "datatools.features",
    "batch_rows": "datatools.features",
    "covered": "datatools.gradients",
    "per_sample_grads": "datatools.gradients",
    "token_batches": "datatools.gradients",
    "visit_per_sample_grads": "datatools.gradients",
    "keep_pages": "datatools.memory",
    "Order": "datatools.orders",
    "PROJECTORS": "datatools.projectors",
    "Projector": "datatools.projectors",
    "AGGREGATIONS": "datatools.scores",
    "aggregate": "datatools.scores",
    "influence": "datatools.scores",
    "influence_paper": "datatools.scores",
    "subtask_means": "datatools.scores",
    "subtask_targets": "datatools.scores",
    "Budget": "datatools.budget",
    "Candidates": "datatools.selection",
    "Selection": "datatools.selection",
    "SELECTORS": "datatools.selectors",
    "select": "datatools.selectors",
    "GradientFeatures": "datatools.store",
    "OtherFeatures": "datatools.store",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'datatools' has no attribute '{name}'")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
