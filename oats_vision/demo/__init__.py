"""The demo that ships with the package: a trained ViT for Fashion-MNIST, its pictures, and a book."""

from pathlib import Path

DIRECTORY = Path(__file__).parent  # a model directory in timm's format, with data beside it
