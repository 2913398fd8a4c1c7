"""Sub-commands that need more than a few lines; `nsagen.cli` puts them together."""
