"""Block-scaled FP8, grouped matmul and latent attention kernels in Pallas; imports jax only.

* `quantize`: `quantize_tiles` and `quantize_blocks` (E4M3 with FP32 scales), both axes in one pass
  (`quantize_tiles_both`, `quantize_blocks_both`), and of a SwiGLU (`swiglu_quantize_tiles`) and its
  gradient (`swiglu_gradient_quantize_tiles`).
* `matmul`: `fp8_matmul`, promoted to FP32 every 128 of the contracted axis.
* `grouped_matmul`: a matrix per group of rows: `grouped_matmul` (differentiable), and in FP8
  `fp8_grouped_matmul` and `fp8_grouped_wgrad`. Groups may be empty, of any size, and may leave rows
  over, which are zeros and cost nothing.
* `linear`: whole layers with all products in FP8, differentiable: `fp8_linear` and
  `fp8_grouped_linear`, and feed-forward networks: `fp8_swiglu_ffn`, `fp8_grouped_swiglu_ffn`.
* `mla_attention`: `mla_decode`, attention over the latent cache.
* `reference`: what all of these must equal, in plain ``jax.numpy``.

``impl="auto"`` takes the fastest that can run and logs what it took; any other is taken at its word
and raises where it cannot run.
"""
