"""Block-scaled FP8 and grouped matmul kernels in Pallas; imports jax only."""
