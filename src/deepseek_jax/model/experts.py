"""The routed experts of one device: gather the chosen tokens, grouped SwiGLU, sum back."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt8

from deepseek_jax import sharding
from deepseek_jax.config import Precision
from deepseek_jax.model.layers import Weight, swiglu
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.linear import as_bytes, fp8_grouped_swiglu_ffn_returned, from_bytes
from pallas_kernels.quantize import Quantized, quantize_tiles


class Pairs(NamedTuple):
    """(token, key) pairs sorted by key; the keys are experts, or the devices that hold them."""

    token_M: Int[Array, "M"]
    """Whose row each pair takes. Past the last pair: any token."""
    choice_M: Int[Array, "M"]
    """Which of the flattened (token, slot) choices each pair is."""
    slot_TK: Int[Array, "T K"]
    """Where each choice lies among the pairs; M for a choice that is absent."""
    sizes_G: Int[Array, "G"]
    """Pairs of each key."""


def sorted_pairs(keys_TK: Int[Array, "T K"], num_keys: int, most: int) -> Pairs:
    """Sort the choices by key. Those with key ``num_keys`` are absent; ``most`` bounds the rest."""
    T, K = keys_TK.shape
    keys = keys_TK.reshape(-1)
    order = jnp.argsort(keys, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(T * K), unique_indices=True)
    slot_TK = jnp.where(keys < num_keys, place, most).reshape(T, K)
    sizes_G = jnp.bincount(keys, length=num_keys).astype(jnp.int32)
    order = order[:most]
    return Pairs(order // K, order, slot_TK.astype(jnp.int32), sizes_G)


class Fp8Rows(NamedTuple):
    """Tokens as FP8 products take them and as they are sent: E4M3 in 1x128 tiles, row by row.

    V3 section 3.3.3: quantized once, before dispatch, with scales that are powers of two. A
    gradient has no place in E4M3. It flows through the tokens in the compute dtype, which go
    along as zeros that nobody reads and XLA therefore does not make. Neither has E4M3 a place among
    what is kept for the backward pass (see `pallas_kernels.linear.as_bytes`), so these are bytes.
    """

    values_TD: UInt8[Array, "T D"]
    scales_Tk: Float[Array, "T k"]

    def take(self, rows_M: Int[Array, "M"]) -> "Fp8Rows":
        """The rows of these numbers."""
        return Fp8Rows(take_rows(self.values_TD, rows_M), self.scales_Tk[rows_M])


def fp8_rows(x_TD: Float[Array, "T D"], precision: Precision) -> Fp8Rows | None:
    """Tokens quantized for the products that ``precision`` asks for; None: as they are."""
    if precision.matmuls != "fp8":
        return None
    x_TD = jax.lax.stop_gradient(x_TD.astype(precision.compute_dtype))
    q = quantize_tiles(x_TD, power_of_two=True)
    return Fp8Rows(as_bytes(q.values), q.scale.T)


class Way(NamedTuple):
    """By which the gradient of rows comes to the experts in FP8, in 1x128 tiles (`Outputs`)."""

    values_TD: Float[Array, "T D"]
    scales_Tk: Float[Array, "T k"]


class Outputs(NamedTuple):
    """What experts have made of rows; in FP8 also the way by which the gradient comes back to it.

    V3 section 3.3.3: the gradient is quantized once, where it sets out, and sent to the experts in
    FP8. A gradient has the dtype of what it is the gradient of, so beside the outputs, which are
    BF16, there go E4M3 tiles with scales: zeros that nobody reads and XLA does not make. *Their*
    gradient is that of the outputs (`with_gradient`), and takes the outputs' way backwards.
    """

    y_TD: Float[Array, "T D"]
    way: Way | None = None

    def with_gradient(self, dtype: DTypeLike) -> Float[Array, "T D"]:
        """The outputs alone, their gradient (rounded to ``dtype``) from here on by its own way."""
        return self.y_TD if self.way is None else _with_gradient(self.y_TD, self.way, dtype)


def fp8_gradient(ct_TD: Float[Array, "T D"]) -> Way:
    """A gradient quantized for its way."""
    q = quantize_tiles(ct_TD, power_of_two=True)
    return Way(q.values, q.scale.T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_gradient(y_TD: jax.Array, way: Way, dtype: DTypeLike) -> jax.Array:
    return y_TD


_with_gradient.defvjp(
    lambda y_TD, way, dtype: (y_TD, None),
    lambda dtype, _, ct_TD: (None, fp8_gradient(ct_TD.astype(dtype))),
)


def take_rows(x_TD: Shaped[Array, "T D"], rows_M: Int[Array, "M"]) -> Shaped[Array, "M D"]:
    """``x_TD[rows_M]``, on a GPU as words of 32 bits.

    Number by number XLA takes 1.7 times as long for bytes, and 1.2 for BF16 (docs/performance.md).
    """
    words, left = divmod(x_TD.dtype.itemsize * x_TD.shape[1], 4)
    if not sharding.on_gpu() or left or x_TD.dtype.itemsize >= 4:
        return x_TD[rows_M]
    x_TWb = x_TD.reshape(len(x_TD), words, -1)
    taken_MW = jax.lax.bitcast_convert_type(x_TWb, jnp.uint32)[rows_M]
    return jax.lax.bitcast_convert_type(taken_MW, x_TD.dtype).reshape(len(rows_M), -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_pairs(x_TD: Float[Array, "T D"], pairs: Pairs, unread: bool = False) -> Float[Array, "M D"]:
    """A copy of its token's row for every pair; zeros where nobody reads it (``Fp8Rows``).

    Its gradient is ``from_pairs``, and the other way round: gathers both, where autodiff would
    scatter-add, which is serial on CPU and atomic on GPU.
    """
    if unread:
        return jnp.zeros((len(pairs.token_M), *x_TD.shape[1:]), x_TD.dtype)
    return take_rows(x_TD, pairs.token_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def from_pairs(
    y_MD: Float[Array, "M D"], pairs: Pairs, unread: bool = False
) -> Float[Array, "T D"]:
    """The sum of its pairs' rows for every token, in float32; zeros where nobody reads it."""
    if unread:
        return jnp.zeros((len(pairs.slot_TK), y_MD.shape[1]), y_MD.dtype)
    total = jnp.zeros((len(pairs.slot_TK), y_MD.shape[1]), jnp.float32)
    # Choice by choice: all gathered at once they would be K times the result.
    for slot_T in pairs.slot_TK.T:
        total += y_MD.at[slot_T].get(mode="fill", fill_value=0)
    return total


to_pairs.defvjp(
    lambda x_TD, pairs, unread: (to_pairs(x_TD, pairs, unread), pairs),
    lambda unread, pairs, ct_MD: (from_pairs(ct_MD, pairs).astype(ct_MD.dtype), None),
)
from_pairs.defvjp(
    lambda y_MD, pairs, unread: (
        from_pairs(y_MD, pairs, unread),
        (pairs, jnp.zeros((), y_MD.dtype)),
    ),
    lambda unread, saved, ct_TD: (to_pairs(ct_TD.astype(saved[1].dtype), saved[0]), None),
)


def compact(keys_TK: Int[Array, "T K"], num_keys: int) -> Int[Array, "T k"]:
    """Every token's present choices first (``sorted_pairs``): which of its K they are, in order.

    Of K slots only as many are kept as there are keys: no token chooses an expert twice.
    """
    order_TK = jnp.argsort(keys_TK >= num_keys, axis=1, stable=True)
    return order_TK[:, : min(keys_TK.shape[1], num_keys)].astype(jnp.int32)


class ExpertWeights(NamedTuple):
    """The device's own experts."""

    w1_EDF: Weight
    w3_EDF: Weight
    w2_EFD: Weight


def local_experts(
    x_TD: Float[Array, "T D"],
    experts_TK: Int[Array, "T K"],
    gates_TK: Float[Array, "T K"],
    weights: ExpertWeights,
    precision: Precision,
    most: int | None = None,
    fp8: Fp8Rows | None = None,
) -> Outputs:
    """Sum over the chosen experts that are here of gate * FFN(x) (V3 Eq. 12), in float32.

    ``experts_TK`` counts from the first expert here; E (how many there are) means elsewhere. At
    most ``most`` choices may be here; default: every token may choose as many as there are.
    ``fp8`` are the tokens of ``fp8_rows`` where they are quantized already; ``x_TD`` is then not
    read.

    The gate multiplies SwiGLU's product and not the output: w2 is linear, and so the product
    costs no pass of its own.
    """
    E = weights.w1_EDF.shape[0]
    if experts_TK.shape[1] > E:
        first_TK = compact(experts_TK, E)
        experts_TK, gates_TK = (
            jnp.take_along_axis(a, first_TK, axis=1) for a in (experts_TK, gates_TK)
        )
    with jax.named_scope("dispatch"):
        pairs = sorted_pairs(experts_TK, E, experts_TK.size if most is None else most)
        pairs = jax.tree.map(lambda a: checkpoint_name(a, "dispatch"), pairs)
        # Kept by its token and not by its pair: gathered again it costs less than the memory.
        fp8 = jax.tree.map(
            lambda a: checkpoint_name(a, "dispatch"), fp8 or fp8_rows(x_TD, precision)
        )
        x_MD = to_pairs(x_TD.astype(precision.compute_dtype), pairs, fp8 is not None)
        fp8 = fp8 and fp8.take(pairs.token_M)
        each = Pairs(pairs.choice_M, pairs.choice_M, pairs.slot_TK.reshape(-1, 1), pairs.sizes_G)
        gates_M1 = to_pairs(gates_TK.reshape(-1, 1), each)
    with jax.named_scope("experts"):
        y_MD, way = _experts(x_MD, fp8, gates_M1, pairs.sizes_G, weights, precision)
    with jax.named_scope("dispatch"):
        way = jax.tree.map(lambda a: from_pairs(a, pairs, True), way)
        return Outputs(from_pairs(y_MD, pairs), way)


def _experts(
    x_MD: jax.Array,
    fp8: Fp8Rows | None,
    gates_M1: jax.Array,
    sizes_G: jax.Array,
    weights: ExpertWeights,
    precision: Precision,
) -> Outputs:
    """Of every pair, gate * FFN(x) by its own expert."""
    if fp8 is not None:
        rows = Quantized(from_bytes(fp8.values_TD), fp8.scales_Tk.T)
        y_MD, way = fp8_grouped_swiglu_ffn_returned(
            x_MD, gates_M1[:, 0], *weights, sizes_G, quantized=rows
        )
        return Outputs(y_MD, Way(way.values, way.scale.T))
    w1_EDF, w3_EDF, w2_EFD = weights
    times: Any = functools.partial(grouped_matmul, group_sizes_G=sizes_G)
    gate, up = (checkpoint_name(times(x_MD, w), "ffn_gate_up") for w in (w1_EDF, w3_EDF))
    return Outputs(times(swiglu(gate, up, precision, gates_M1), w2_EFD))
