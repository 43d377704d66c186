"""Holdfast: plan it, run the plan, lose nothing."""

__version__ = "0.1.0"
