"""Training: configs, data, checkpoints, and the runs that they make up."""
