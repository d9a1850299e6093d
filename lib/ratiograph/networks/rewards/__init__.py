"""Pretrained rewards of images: CLIP, PickScore, aesthetic, HPSv2, ImageReward, also through a latent decoder.

The contract, and rewards in closed form, are `algebra.rewards`. Read first: `image_rewards`.
"""
