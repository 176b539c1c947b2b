"""mljax: multi-label image classification in JAX."""

__version__ = "0.1.0"
