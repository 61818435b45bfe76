"""The tracks: one file or folder each."""
