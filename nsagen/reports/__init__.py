"""Pictures as self-contained HTML: no external scripts, light and dark, any width."""
