"""What the project exists for: the field v = omega(r) d - omega(r*) grad log r* and each of its parts.

Noising, times, weightings and their normalisers, directions, targets, rewards, terms and losses; no network is
defined here. Imports `core`. Read first: `objective`, then `weightings`, `directions` and `targets`. A new divergence
is a class in `weightings`.
"""
