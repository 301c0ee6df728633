"""What the training stages share: data on disk, its sampling, the loop around a model."""
