"""Pretrained rewards of images: CLIP, PickScore, aesthetic, HPSv2, ImageReward, also through a latent decoder.

Their base class, and rewards in closed form, are in `algebra.rewards`. Read first: `image_rewards`.
"""
