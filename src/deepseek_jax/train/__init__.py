"""Losses, optimizer, training step and loop."""
