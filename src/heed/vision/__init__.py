"""Image backbones, one file per architecture."""
