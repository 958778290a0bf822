"""gori: an on-device distilled model toolkit. This package's root imports nothing heavy."""

__version__ = "0.1.0"
