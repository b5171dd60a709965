"""Attention over the latent cache of MLA with absorbed queries, as in decoding (V2 section 2.1).

All heads of a token share one key and one value, the latent: a step of decoding multiplies every
slot with N queries, and reads it once. What an implementation has to see to is that it does so from
where the slot lies, in the stack of all layers, and that slots nobody has filled cost nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import backend, reference
from pallas_kernels.backend import Impl


def mla_decode(
    q_nope_BTNR: Float[Array, "B T N R"],
    q_pe_BTNP: Float[Array, "B T N P"],
    c_kv_LBSR: Float[Array, "L B S R"],
    k_pe_LBSP: Float[Array, "L B S P"],
    length_B: Int[Array, "B"],
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    impl: Impl = "auto",
) -> Float[Array, "B T N R"]:
    """``softmax(scale (q_nope . c_kv + q_pe . k_pe)) c_kv`` over the slots of one layer.

    Query t of row b sits in slot ``length_B[b] + t`` and sees the slots up to its own; what the
    others hold is of no effect, NaN included. A query before slot 0 sees none, and gets zeros.

    Args:
        q_nope_BTNR: queries with the unfolding of the keys absorbed.
        q_pe_BTNP: their rotated part.
        c_kv_LBSR: the stack of all layers' latents, from which the layer is read in place.
        k_pe_LBSP: and of the rotated parts of the keys.
        length_B: tokens in the cache before the first query's. T queries may reach past slot S.
        layer: which of the stack.
        scale: of the scores.
        impl: ``hopper`` needs bfloat16, R = 512, P = 64 and S a multiple of 8, at least 64;
            ``tpu`` bfloat16, R a multiple of 128 and P of 16, and in `shard_map` it wants
            ``check_vma=False``.
            ``reference`` has the scores of all S slots in memory. ``auto`` takes what can run, and
            logs it.

    Returns:
        In the dtype of the queries; scores and sums are float32.

    Raises:
        ValueError: if a kernel is asked for operands that it cannot take.
    """
    backend.check_impl("mla_decode", impl, ("auto", "hopper", "tpu", "reference"))
    arrays = q_nope_BTNR, q_pe_BTNP, c_kv_LBSR, k_pe_LBSP
    if impl == "auto":
        impl = _pick(*arrays)
        backend.say_once("mla_decode", impl)
    layer = jnp.asarray(layer, jnp.int32)
    operands = backend.varying_alike(*arrays, length_B, layer)
    if impl == "reference":
        return reference.mla_decode(*operands, scale=scale)
    if not (_hopper_can if impl == "hopper" else _tpu_can)(*arrays):
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in arrays)
        raise ValueError(f"mla_decode: impl={impl!r} cannot take {shapes}")
    if impl == "hopper":
        from pallas_kernels.hopper import mla_attention as hopper

        return hopper.mla_decode(*operands, scale=scale)
    from pallas_kernels.tpu import mla_attention as tpu

    return tpu.mla_decode(*operands, scale=scale)


def has_kernel(
    q_nope_BTNR: Float[Array, "B T N R"],
    q_pe_BTNP: Float[Array, "B T N P"],
    c_kv_LBSR: Float[Array, "L B S R"],
    k_pe_LBSP: Float[Array, "L B S P"],
) -> bool:
    """Whether ``auto`` is a kernel here: a caller may know better than the reference."""
    return _pick(q_nope_BTNR, q_pe_BTNP, c_kv_LBSR, k_pe_LBSP) != "reference"


def _pick(*arrays: jax.Array) -> Impl:
    if backend.platform() == "tpu":
        return "tpu" if _tpu_can(*arrays) else "reference"
    return "hopper" if backend.on_hopper() and _hopper_can(*arrays) else "reference"


def _tpu_can(*arrays: jax.Array) -> bool:
    R, P = arrays[0].shape[-1], arrays[1].shape[-1]
    return _in_bfloat16(*arrays) and R % 128 == P % 16 == 0


def _hopper_can(*arrays: jax.Array) -> bool:
    R, P, S = arrays[0].shape[-1], arrays[1].shape[-1], arrays[2].shape[2]
    return _in_bfloat16(*arrays) and (R, P) == (512, 64) and S % 8 == 0 and S >= 64


def _in_bfloat16(*arrays: jax.Array) -> bool:
    return all(x.dtype == jnp.bfloat16 and 0 not in x.shape for x in arrays)
