"""`heed compare cache`: caches and sparse attention in a language model, by what they save and what they lose."""
