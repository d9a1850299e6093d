"""Denoisers with a world of their own: the exact Gaussian mixture, and Stable Diffusion.

Read first: `mixture`, in which every quantity of the algebra is a closed form. A teacher with an EDM network needs no
class here: `denoisers.EDM`.
"""
