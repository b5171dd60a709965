"""Block-scaled FP8, grouped matmul and latent attention kernels in Pallas: jax and jaxtyping only.

A layer, differentiable, from activations in BF16 and the FP32 master copy of its weight:

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels.linear import fp8_linear
    >>> x_MK, w_KN = jnp.ones((256, 512), jnp.bfloat16), jnp.ones((512, 384))
    >>> fp8_linear(x_MK, w_KN).shape
    (256, 384)
    >>> jax.grad(lambda w_KN: fp8_linear(x_MK, w_KN).sum())(w_KN).dtype
    dtype('float32')

and its product by itself, of operands that are quantized once and used more often; their contracted
axis is the last, as tensor cores want it:

    >>> from pallas_kernels.matmul import fp8_matmul
    >>> from pallas_kernels.quantize import quantize_blocks, quantize_tiles
    >>> a_MK, b_NK = quantize_tiles(x_MK), quantize_blocks(w_KN.T)
    >>> fp8_matmul(a_MK, b_NK).shape
    (256, 384)

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

Layers and `grouped_matmul` take weights as ``[K, N]``, one per group as ``[G, K, N]``; products of
quantized operands take them as ``[N, K]`` and ``[G, N, K]``.

``impl="auto"`` takes the fastest that can run and logs what it took; any other is taken at its word
and raises where it cannot run. On an accelerator, that no kernel takes the operands is a warning.
"""
