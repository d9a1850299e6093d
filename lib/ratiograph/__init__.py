"""ratiograph: one-step diffusion distillation as a declarative graph of density-ratio components."""

__version__ = "0.1.0"
