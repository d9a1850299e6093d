"""Reads and writes files of weights: safetensors, diffusers' folders, and official EDM pickles, which run no code.

Read first: `weight_files`. A converter for another suffix registers itself there (`register_converter`).
"""
