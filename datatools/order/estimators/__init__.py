"""Estimators of what another order would have done."""
