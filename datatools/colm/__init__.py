"""Coresets inside the training loop: each step draws a large batch and trains on a small one (CoLM)."""

from datatools.colm.by_products import BY_PRODUCTS, ByProducts
from datatools.colm.choice import CORESET_METHODS, choose_rows, coreset_method, select_batch
from datatools.colm.chosen import Chosen
from datatools.colm.colm import CORESET_FEATURES, CoLM
from datatools.colm.feature import FeatureKind
from datatools.colm.history import History
from datatools.colm.last_layer import LastLayer
from datatools.colm.monitor import costs_more, matching_error, not_better, random_error, saved_seconds, worth_in_rows
from datatools.colm.quotas import Plan, budgets, kept_by_source, plan
from datatools.colm.small_sources import cluster_sources, small_sources
from datatools.colm.table import FeatureTable
from datatools.colm.weights import correct_expectation
from datatools.subsets.method import CoresetMethod

__all__ = [
    "BY_PRODUCTS",
    "CORESET_FEATURES",
    "CORESET_METHODS",
    "ByProducts",
    "Chosen",
    "CoLM",
    "CoresetMethod",
    "FeatureKind",
    "FeatureTable",
    "History",
    "LastLayer",
    "Plan",
    "budgets",
    "choose_rows",
    "cluster_sources",
    "coreset_method",
    "correct_expectation",
    "costs_more",
    "kept_by_source",
    "matching_error",
    "not_better",
    "plan",
    "random_error",
    "saved_seconds",
    "select_batch",
    "small_sources",
    "worth_in_rows",
]
