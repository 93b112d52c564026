"""Coresets inside the training loop: each step draws a large batch and trains on a small one (CoLM)."""

from datatools.colm.choice import CORESET_METHODS, choose_rows, coreset_method, select_batch
from datatools.colm.colm import CORESET_FEATURES, Chosen, CoLM, kept_by_source
from datatools.colm.feature import FeatureKind
from datatools.colm.history import History
from datatools.colm.last_layer import LastLayer
from datatools.colm.monitor import matching_error, not_better, random_error
from datatools.colm.quotas import Plan, budgets, plan
from datatools.colm.small_sources import cluster_sources, small_sources
from datatools.subsets.method import CoresetMethod

__all__ = [
    "CORESET_FEATURES",
    "CORESET_METHODS",
    "Chosen",
    "CoLM",
    "CoresetMethod",
    "FeatureKind",
    "History",
    "LastLayer",
    "Plan",
    "budgets",
    "choose_rows",
    "cluster_sources",
    "coreset_method",
    "kept_by_source",
    "matching_error",
    "not_better",
    "plan",
    "random_error",
    "select_batch",
    "small_sources",
]
