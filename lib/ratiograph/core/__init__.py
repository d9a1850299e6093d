"""Values, contracts and services that every other room uses.

`types` holds what travels between components, `contracts` what a graph's parts ask of each other (`Denoiser`,
`RatioEstimator`, `Evaluation`); the rest is randomness, processes, second derivatives and files. Imports no other room.
Read first: `types`, then `contracts`.
"""
