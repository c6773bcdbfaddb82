"""Datasets, augmentation and batches. Nothing here needs TensorFlow."""
