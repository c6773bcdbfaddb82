"""Experiment configs: ml_collections `get_config()` files, one for a row of a table."""
