"""Networks: the compact U-Net, the perceptron for vectors, and the digit classifier."""

from ratiograph.networks.classifier import DigitClassifier
from ratiograph.networks.unet import MLP, UNet

__all__ = ["MLP", "DigitClassifier", "UNet"]
