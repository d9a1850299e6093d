"""What reads samples: shards of images, captions and latents, in an order that belongs to the seed alone.

Imports `core`. Read first: `stream` (batches of images), then `sample_order` and `loader`; `captioned` and `latents`
are the streams of text-to-image runs. Shards are made by `tools/make_shards.py` and `tools/cache_latents.py`.
"""
