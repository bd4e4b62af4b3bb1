"""Figures, each written as a PNG."""
