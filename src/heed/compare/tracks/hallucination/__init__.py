"""The track `hallucination`: ask a vision-language model what is in images, as it is and steered by every method."""
