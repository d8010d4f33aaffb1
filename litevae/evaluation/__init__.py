"""Measuring autoencoders."""
