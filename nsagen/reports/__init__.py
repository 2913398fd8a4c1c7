"""Pictures as self-contained HTML: no scripts from elsewhere, light and dark, any width."""
