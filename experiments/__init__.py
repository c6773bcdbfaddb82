"""What a person runs: `python -m experiments.train`, `python -m experiments.evaluate`."""
