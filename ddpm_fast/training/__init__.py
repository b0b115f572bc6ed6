"""From a JSON file to a trained model: what the command line runs."""
