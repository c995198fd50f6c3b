"""Metrics of samples: feature networks, distances between sets of features, and copies of training images."""
