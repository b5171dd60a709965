"""Kernels for TPUs, written with Pallas' Mosaic TPU backend."""
