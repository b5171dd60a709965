"""The block-scaled FP8 matmul of DeepSeek-V3 (section 3.3), and the choice of its backend."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import backend, reference
from pallas_kernels.backend import Impl
from pallas_kernels.reference import Quantized, check_product


def fp8_matmul(
    a: Quantized, b: Quantized, *, out_dtype=jnp.bfloat16, impl: Impl = "auto"
) -> Float[Array, "M N"]:
    """``a @ b.T`` for quantized matrices, promoted to FP32 every 128 of K (V3 figure 7b).

    Both operands have the contracted axis last. ``b`` with 128x128 block scales gives the forward
    pass and the input gradient; ``b`` with 1x128 tile scales gives the weight gradient.

    Args:
        a: [M, K] values with tile scales, from `quantize_tiles`.
        b: [N, K] values with block or tile scales; with block scales it may be one of a stack,
            [L, N, K], which ``hopper`` reads in place.
        out_dtype: bfloat16 or float32; sums are FP32 either way.
        impl: ``hopper``, ``tpu`` and ``reference`` are taken at their word and raise where they
            cannot run; ``auto`` picks by the default device and logs what it picked, once. In
            `shard_map`, ``tpu`` wants ``check_vma=False``.

    Returns:
        The [M, N] product.

    Raises:
        ValueError: if the operands do not fit one another, or ``a`` has block scales.
    """
    backend.check_impl("fp8_matmul", impl, ("auto", "hopper", "tpu", "reference"))
    check_product(a, b)
    if impl == "auto":
        impl = _pick()
    if impl == "reference":
        return reference.fp8_matmul(a, b, out_dtype=out_dtype)
    if impl == "hopper":
        from pallas_kernels.hopper import matmul as hopper_matmul

        return hopper_matmul.fp8_matmul(a, b, out_dtype=out_dtype)
    from pallas_kernels.tpu import matmul as tpu_matmul

    return tpu_matmul.fp8_matmul(a, b.cut_out(), out_dtype=out_dtype)


def _pick() -> Impl:
    impl: Impl = "reference"
    if backend.platform() == "tpu":
        impl = "tpu"
    elif backend.on_hopper():
        impl = "hopper"
    backend.say_once("fp8_matmul", impl)
    return impl
