"""What a training loop is made of: state, optimizer, sharding, steps, checkpoints, metrics."""
