"""blipdiff_train: an open, complete and verified training framework for BLIP-Diffusion (arXiv 2305.14720)."""

__version__ = "0.1.0"
