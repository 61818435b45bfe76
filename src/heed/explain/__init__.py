"""Analyses of what a model attends to."""
