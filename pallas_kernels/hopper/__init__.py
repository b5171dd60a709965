"""Kernels for Hopper GPUs (Pallas, Mosaic GPU).

What calls a kernel is jitted, here or in the module above: calls of one shape are then traced and
lowered once for a program, where lowering one takes a third of a second. An FP8 step of V3 has 83.
"""
