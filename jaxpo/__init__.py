"""jaxpo: preference alignment of language models with JAX."""

__version__ = "0.1.0"
