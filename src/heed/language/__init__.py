"""Language models, sparse long-context attention, caches: methods and models for transformers."""
