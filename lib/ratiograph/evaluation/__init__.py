"""What judges samples: feature extractors, distances and scores, and the evaluators that a run names.

Imports every room below, and not `reports`. Read first: `image_evaluator` (the field's protocol), then `metrics` and
`features`. A new metric is a `FeatureMetric` in `metrics`.
"""
