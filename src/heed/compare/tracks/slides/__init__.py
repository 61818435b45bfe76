"""The track `slides`: train every method on bags of instance features with one label each, and rank by test AUC."""
