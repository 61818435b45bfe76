"""Diffusion models: attention processors for diffusers."""
