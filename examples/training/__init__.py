"""What `examples/train_toy.py` is made of: tasks, the loop, parallelism, checkpoints, plots."""
