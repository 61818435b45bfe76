"""The track `classify`: train every method on labelled images, at the same budget, and rank by test accuracy."""
