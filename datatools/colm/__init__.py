"""Coresets inside the training loop: large batches in, small ones out (CoLM)."""

from datatools.colm.choice import CORESET_METHODS, Plan, choose_rows, plan, select_batch
from datatools.colm.colm import Chosen, CoLM, History, kept_by_source
from datatools.colm.last_layer import LastLayer
from datatools.colm.monitor import matching_error, not_better, random_error
from datatools.colm.small_sources import budgets, cluster_sources, small_sources

__all__ = [
    "CORESET_METHODS",
    "Chosen",
    "CoLM",
    "History",
    "LastLayer",
    "Plan",
    "budgets",
    "choose_rows",
    "cluster_sources",
    "kept_by_source",
    "matching_error",
    "not_better",
    "plan",
    "random_error",
    "select_batch",
    "small_sources",
]
