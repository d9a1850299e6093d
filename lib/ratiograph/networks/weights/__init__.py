"""Files of weights, read as data: safetensors, diffusers' folders, official EDM pickles through a restricted reader.

Read first: `weight_files`. A converter for another suffix registers itself there (`register_converter`).
"""
