"""Kernels for Hopper GPUs (H100, H200), written with Pallas' Mosaic GPU backend."""
