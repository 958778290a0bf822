"""Train a mixture-of-experts teacher: the loop, its optimizers and its checkpoints."""
