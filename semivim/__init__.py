"""Vision state-space models for timm, and semi-supervised training on them."""

__version__ = "0.1.0"
