"""The version, for what is written down with it."""

__version__ = '0.2.0'
