"""Pre-training without labels: mask generators, encoders that can drop tokens, and objectives around them."""
