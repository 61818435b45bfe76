"""`heed compare language`: small language models with every kind of attention, trained on the same bytes of text."""
