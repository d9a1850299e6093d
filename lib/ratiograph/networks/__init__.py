"""The nodes of a graph: denoisers and their wrappers, students, ratio estimators, samplers, text encoders.

`architectures` holds the networks inside them, `teachers` those with a world of their own, `rewards` pretrained
rewards, `weights` files read without executing them. The networks of EDM and the others are written afresh from the
papers, to fit the published weights; none is copied. Imports `core`, `algebra` and `data`. Read first: `denoisers`,
`students`, `ratios`.
"""

from ratiograph.networks import edm_weights as edm_weights  # lets every denoiser load official EDM files
