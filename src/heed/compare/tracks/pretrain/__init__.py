"""The track `pretrain`: pre-train without labels by every objective, at the same budget, and see what was learnt."""
