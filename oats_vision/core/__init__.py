"""The mathematics of OATS on matrices: no model, no file, no device policy."""

from typing import Literal

Solver = Literal["fast", "exact"]  # how OATS finds the low-rank term
