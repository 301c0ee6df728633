"""One thin script a training stage."""
