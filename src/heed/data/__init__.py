"""Real data in the form heed trains on."""
