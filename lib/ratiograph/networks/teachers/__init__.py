"""Teachers with classes of their own: the exact Gaussian mixture, and Stable Diffusion.

Read first: `mixture`, in which every quantity of the algebra is a closed form. A teacher with an EDM network is a
`denoisers.EDM`, from the folder above.
"""
