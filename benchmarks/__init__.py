"""Measures the budgets of the design as ratios within one run. Nothing here decides a test."""
