"""What sample_speed.py and train_speed.py share: options, networks, measuring and the report."""
