"""The version, in a leaf: nobody needs the root to know it."""

__version__ = "0.1.0"
