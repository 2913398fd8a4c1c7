"""Doors to other libraries' models and checkpoints. Nothing here is imported by `import nsagen`."""
