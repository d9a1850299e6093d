"""Figures of the papers. Each module has functions that return a figure's numbers, and others that only draw them.

Notation: a figure's numbers are *rows*, a list of dicts with the same keys; they are what the CSV beside it holds.
"""
