"""The command line, and its commands other than training."""
