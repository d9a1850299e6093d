"""Networks by what they compute alone: U-Nets, a perceptron, classifiers.

Each has ``encode`` and ``decode`` (or is a classifier), and knows nothing of noising or denoising. Imports `core` and
`networks.weights`. Read first: `unet`, the smallest.
"""
