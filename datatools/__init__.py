"""Data tools for language-model training: gradient features, influence scores, selection.

Takes tensors and loss functions; knows no model class and no tokenizer. Names are imported on first use, so that
`datatools.files` and `datatools.errors` cost no torch.
"""

from importlib import import_module
from os.path import abspath, dirname
from typing import TYPE_CHECKING, Any

from datatools.shadowed import check_packages

check_packages("optim", home=dirname(dirname(abspath(__file__))), needed_by="datatools")

if TYPE_CHECKING:
    from datatools import order as order
    from datatools.colm import BY_PRODUCTS as BY_PRODUCTS
    from datatools.colm import CORESET_FEATURES as CORESET_FEATURES
    from datatools.colm import CORESET_METHODS as CORESET_METHODS
    from datatools.colm import ByProducts as ByProducts
    from datatools.colm import CoLM as CoLM
    from datatools.colm import CoresetMethod as CoresetMethod
    from datatools.colm import FeatureKind as FeatureKind
    from datatools.colm import FeatureTable as FeatureTable
    from datatools.colm import LastLayer as LastLayer
    from datatools.colm import cluster_sources as cluster_sources
    from datatools.colm import coreset_method as coreset_method
    from datatools.colm import costs_more as costs_more
    from datatools.colm import kept_by_source as kept_by_source
    from datatools.colm import matching_error as matching_error
    from datatools.colm import not_better as not_better
    from datatools.colm import saved_seconds as saved_seconds
    from datatools.colm import select_batch as select_batch
    from datatools.colm.small_sources import small_sources as small_sources
    from datatools.errors import DataError as DataError
    from datatools.errors import DatatoolsError as DatatoolsError
    from datatools.errors import EnvironmentProblem as EnvironmentProblem
    from datatools.errors import UsageError as UsageError
    from datatools.errors import did_you_mean as did_you_mean
    from datatools.features.encodings import ENCODINGS as ENCODINGS
    from datatools.features.extract import batch_rows as batch_rows
    from datatools.features.extract import extract as extract
    from datatools.features.neighbours import Clusters as Clusters
    from datatools.features.neighbours import Neighbours as Neighbours
    from datatools.features.neighbours import clusters as clusters
    from datatools.features.neighbours import nearest as nearest
    from datatools.features.plan import OtherFeatures as OtherFeatures
    from datatools.features.store import GradientFeatures as GradientFeatures
    from datatools.files.order_file import Order as Order
    from datatools.gradients import MicroBatches as MicroBatches
    from datatools.gradients import TokenBudget as TokenBudget
    from datatools.gradients import covered as covered
    from datatools.gradients import is_out_of_memory as is_out_of_memory
    from datatools.gradients import keep_gradients as keep_gradients
    from datatools.gradients import micro_batches as micro_batches
    from datatools.gradients import per_sample_grads as per_sample_grads
    from datatools.gradients import token_batches as token_batches
    from datatools.gradients import visit_per_sample_grads as visit_per_sample_grads
    from datatools.less.aggregate import AGGREGATIONS as AGGREGATIONS
    from datatools.less.aggregate import aggregate as aggregate
    from datatools.less.common import common_directions as common_directions
    from datatools.less.common import without as without
    from datatools.less.influence import influence as influence
    from datatools.less.influence import influence_paper as influence_paper
    from datatools.less.influence import subtask_targets as subtask_targets
    from datatools.less.less import LessScores as LessScores
    from datatools.less.less import less_scores as less_scores
    from datatools.less.preference import extract_preferences as extract_preferences
    from datatools.memory import keep_pages as keep_pages
    from datatools.paired import Paired as Paired
    from datatools.paired import bootstrap_mean as bootstrap_mean
    from datatools.paired import compare as compare
    from datatools.projectors import PROJECTORS as PROJECTORS
    from datatools.projectors import Projector as Projector
    from datatools.scores.bm25 import Bm25Statistics as Bm25Statistics
    from datatools.scores.bm25 import bm25 as bm25
    from datatools.scores.loss_drop import loss_drop as loss_drop
    from datatools.scores.span import TargetSpan as TargetSpan
    from datatools.scores.span import gram_matrix as gram_matrix
    from datatools.scores.span import span_coefficients as span_coefficients
    from datatools.scores.specificity import most_specific as most_specific
    from datatools.scores.specificity import specificity as specificity
    from datatools.selection.budget import Budget as Budget
    from datatools.selection.candidates import Candidates as Candidates
    from datatools.selection.candidates import Selection as Selection
    from datatools.selection.coverage import coverage_order as coverage_order
    from datatools.selection.fusion import fuse as fuse
    from datatools.selection.round_robin import round_robin_order as round_robin_order
    from datatools.selection.selectors import SELECTORS as SELECTORS
    from datatools.selection.selectors import select as select
    from datatools.selection.several import SHARINGS as SHARINGS
    from datatools.selection.several import several as several
    from datatools.selection.subtasks import subtask_means as subtask_means
    from datatools.stats import bootstrap_interval as bootstrap_interval
    from datatools.stats import spearman as spearman
    from datatools.stats import spearman_rows as spearman_rows
    from datatools.stats import t_interval as t_interval

# public name -> the module that defines it
_EXPORTS = {
    "spearman": "datatools.stats",
    "t_interval": "datatools.stats",
    "bootstrap_interval": "datatools.stats",
    "spearman_rows": "datatools.stats",
    "Paired": "datatools.paired",
    "bootstrap_mean": "datatools.paired",
    "compare": "datatools.paired",
    "BY_PRODUCTS": "datatools.colm",
    "ByProducts": "datatools.colm",
    "FeatureTable": "datatools.colm",
    "CORESET_FEATURES": "datatools.colm",
    "CORESET_METHODS": "datatools.colm",
    "CoresetMethod": "datatools.colm",
    "FeatureKind": "datatools.colm",
    "coreset_method": "datatools.colm",
    "CoLM": "datatools.colm",
    "LastLayer": "datatools.colm",
    "cluster_sources": "datatools.colm",
    "costs_more": "datatools.colm",
    "saved_seconds": "datatools.colm",
    "kept_by_source": "datatools.colm",
    "matching_error": "datatools.colm",
    "not_better": "datatools.colm",
    "select_batch": "datatools.colm",
    "small_sources": "datatools.colm",
    "ENCODINGS": "datatools.features.encodings",
    "DataError": "datatools.errors",
    "DatatoolsError": "datatools.errors",
    "EnvironmentProblem": "datatools.errors",
    "UsageError": "datatools.errors",
    "did_you_mean": "datatools.errors",
    "extract": "datatools.features.extract",
    "batch_rows": "datatools.features.extract",
    "covered": "datatools.gradients",
    "MicroBatches": "datatools.gradients",
    "TokenBudget": "datatools.gradients",
    "is_out_of_memory": "datatools.gradients",
    "micro_batches": "datatools.gradients",
    "keep_gradients": "datatools.gradients",
    "per_sample_grads": "datatools.gradients",
    "token_batches": "datatools.gradients",
    "visit_per_sample_grads": "datatools.gradients",
    "keep_pages": "datatools.memory",
    "Order": "datatools.files.order_file",
    "PROJECTORS": "datatools.projectors",
    "Projector": "datatools.projectors",
    "AGGREGATIONS": "datatools.less.aggregate",
    "aggregate": "datatools.less.aggregate",
    "common_directions": "datatools.less.common",
    "without": "datatools.less.common",
    "influence": "datatools.less.influence",
    "influence_paper": "datatools.less.influence",
    "subtask_means": "datatools.selection.subtasks",
    "subtask_targets": "datatools.less.influence",
    "LessScores": "datatools.less.less",
    "less_scores": "datatools.less.less",
    "Bm25Statistics": "datatools.scores.bm25",
    "bm25": "datatools.scores.bm25",
    "loss_drop": "datatools.scores.loss_drop",
    "TargetSpan": "datatools.scores.span",
    "gram_matrix": "datatools.scores.span",
    "span_coefficients": "datatools.scores.span",
    "most_specific": "datatools.scores.specificity",
    "specificity": "datatools.scores.specificity",
    "extract_preferences": "datatools.less.preference",
    "Budget": "datatools.selection.budget",
    "Candidates": "datatools.selection.candidates",
    "Selection": "datatools.selection.candidates",
    "coverage_order": "datatools.selection.coverage",
    "fuse": "datatools.selection.fusion",
    "round_robin_order": "datatools.selection.round_robin",
    "SELECTORS": "datatools.selection.selectors",
    "select": "datatools.selection.selectors",
    "SHARINGS": "datatools.selection.several",
    "several": "datatools.selection.several",
    "GradientFeatures": "datatools.features.store",
    "Clusters": "datatools.features.neighbours",
    "Neighbours": "datatools.features.neighbours",
    "clusters": "datatools.features.neighbours",
    "nearest": "datatools.features.neighbours",
    "OtherFeatures": "datatools.features.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'datatools' has no attribute '{name}'")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
