"""The version of nsagen, apart from the package's top so that every floor can name it."""

__version__ = "0.1.0"
