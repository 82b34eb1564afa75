"""A small, fast, exact JAX/Flax trainer for sentiment on IMDB reviews."""

__version__ = '0.1.0'
