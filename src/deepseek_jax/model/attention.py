"""Multi-head Latent Attention (V2 section 2.1; V3 section 2.1.1, Eqs. 1-11).

Two forms of the same function. *Expanded*, for training and prefill: every head's keys and
values are unfolded from the latent. *Absorbed*, for decoding: the unfolding matrices are folded
into the query and the output, so that only the latent (R + P numbers a token) is ever read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from deepseek_jax import sharding
from deepseek_jax.config import LATENT_NORM_EPS
from deepseek_jax.model.layers import (
    ParamModule,
    Weight,
    dequantized,
    dot,
    linear,
    linears,
    rms_norm,
)
from deepseek_jax.model.rope import apply_rope, rotate_last
from deepseek_jax.types import KVCache
from pallas_kernels.mla_attention import has_kernel, mla_decode
from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.reference import TILE, Quantized

# Scores exist for this many query positions at a time: [B, N, 512, S] and not [B, N, T, S].
QUERY_CHUNK = 512
# Over a cache they exist for this many slots at a time.
KEY_BLOCK = 512
CACHE_BLOCKS = "cache_blocks"  # the scope of the loop over them
# Of slots that are not seen. Finite: a row may see none, and must not become NaN.
LEAST = -1e30
# Under rematerialisation its results are known by it: the second, the sums of softmax, is a
# residual of cuDNN's own and has no name.
CUDNN_ATTENTION = cudnn._dot_product_attention_fwd_p_wrapper


class Positions(NamedTuple):
    """What attention needs to know of the rows: rotations and who may see whom."""

    cos_BTp: Float[Array, "B T p"]
    sin_BTp: Float[Array, "B T p"]
    segment_ids_BT: Int[Array, "B T"]


@jax.named_scope("attention_core")
def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSNH: Float[Array, "B S N H"],
    v_BSNO: Float[Array, "B S N O"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    first: Int[Array, ""] | int,
    scale: float,
) -> Float[Array, "B T N O"]:
    """Causal softmax attention (V3 Eq. 10); scores and softmax in float32.

    Query t is position ``first + t`` of the row whose S keys are all here. ``segments`` are those
    of queries and keys, which do not look beyond their own; None: causality is all there is. On
    NVIDIA GPUs, in 16-bit formats, by cuDNN.
    """
    T, S, H, O = q_BTNH.shape[1], k_BSNH.shape[1], q_BTNH.shape[-1], v_BSNO.shape[-1]

    def seen(start: jax.Array | int, size: int) -> jax.Array:
        """[B or 1, size, S]: who is seen by ``size`` queries from ``start`` on."""
        seen_BTS = ((first + start + jnp.arange(size))[:, None] >= jnp.arange(S))[None]
        if segments is None:
            return seen_BTS
        own_BT = jax.lax.dynamic_slice_in_dim(segments[0], start, size, axis=1)
        return seen_BTS & (own_BT[:, :, None] == segments[1][:, None, :])

    # What cuDNN's flash attention takes.
    fits = q_BTNH.dtype.itemsize == 2 and max(H, O) <= 256 and H % 8 == O % 8 == 0
    if sharding.on_gpu() and fits:
        whole = segments is None and T == S
        mask_BNTS = None if whole else seen(0, T)[:, None]
        # Not through ``jax.nn``, which wants values as wide as keys: V3's 192/128 heads take
        # 11.0 ms, forward and backward, where values padded to 192 take 16.2.
        out: Any = cudnn.dot_product_attention(
            q_BTNH,
            k_BSNH,
            v_BSNO,
            mask=mask_BNTS,
            scale=scale,
            # It lets cuDNN skip what lies above the diagonal.
            mask_type=cudnn.MaskType.CAUSAL if T == S else cudnn.MaskType.NO_MASK,
        )
        return out

    def chunk(start: jax.Array, size: int) -> jax.Array:
        q = jax.lax.dynamic_slice_in_dim(q_BTNH, start, size, axis=1)
        scores = jnp.einsum("btnh,bsnh->bnts", q, k_BSNH, preferred_element_type=jnp.float32)
        scores = jnp.where(seen(start, size)[:, None], scores * scale, -jnp.inf)
        # Softmax's division comes after the product with v: O numbers a query and not S.
        top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - top)
        total_BTN1 = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]
        out = jnp.einsum(
            "bnts,bsno->btno",
            weights.astype(v_BSNO.dtype),
            v_BSNO,
            preferred_element_type=jnp.float32,
        )
        return (out / total_BTN1).astype(v_BSNO.dtype)

    if T <= QUERY_CHUNK:
        return checkpoint_name(chunk(jnp.int32(0), T), "mla_heads")
    whole = T // QUERY_CHUNK * QUERY_CHUNK
    # Without the checkpoint the loop would keep every chunk's scores for the backward pass.
    body = jax.checkpoint(lambda start: chunk(start, QUERY_CHUNK))
    out = jax.lax.map(body, jnp.arange(0, whole, QUERY_CHUNK))
    out = jnp.moveaxis(out, 0, 1).reshape(q_BTNH.shape[0], whole, *v_BSNO.shape[2:])
    if whole < T:
        out = jnp.concatenate([out, chunk(jnp.int32(whole), T - whole)], axis=1)
    return checkpoint_name(out, "mla_heads")


@jax.named_scope("attention_core")
def attend_absorbed(
    q_nope_BTNR: Float[Array, "B T N R"],
    q_pe_BTNP: Float[Array, "B T N P"],
    cache: KVCache,
    layer: Int[Array, ""] | int,
    scale: float,
) -> Float[Array, "B T N R"]:
    """Attention over the latent cache with absorbed queries: one "KV head" of width R + P.

    Query t of row b sits in slot ``cache.length_B[b] + t`` and sees the slots up to its own. By a
    kernel where one fits, which leaves out a latent in FP8.
    """
    operands = q_nope_BTNR, q_pe_BTNP, cache.c_kv_LBSR, cache.k_pe_LBSP
    if cache.scale_LBSG is None and has_kernel(*operands):
        return mla_decode(*operands, cache.length_B, layer, scale=scale)

    def scores(c_kv_BSR: jax.Array) -> jax.Array:
        return jnp.einsum(
            "btnr,bsr->bnts", q_nope_BTNR, c_kv_BSR, preferred_element_type=jnp.float32
        )

    return _over_cache(q_pe_BTNP, cache, layer, scale, lambda c_kv: (scores(c_kv), c_kv))


@jax.named_scope("attention_core")
def attend_expanded(
    q_nope_BTNC: Float[Array, "B T N C"],
    q_pe_BTNP: Float[Array, "B T N P"],
    cache: KVCache,
    layer: Int[Array, ""] | int,
    scale: float,
    expand: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> Float[Array, "B T N O"]:
    """The same with keys and values unfolded, a block of slots at a time.

    ``expand`` is ``c_kv_BSR -> k_nope_BSNC, v_BSNO`` (V3 Eqs. 2 and 5).
    """

    def scores_and_values(c_kv_BSR: jax.Array) -> tuple[jax.Array, jax.Array]:
        k_nope_BSNC, v_BSNO = expand(c_kv_BSR)
        scores = jnp.einsum(
            "btnc,bsnc->bnts", q_nope_BTNC, k_nope_BSNC, preferred_element_type=jnp.float32
        )
        return scores, v_BSNO

    return _over_cache(q_pe_BTNP, cache, layer, scale, scores_and_values)


def _over_cache(
    q_pe_BTNP: jax.Array,
    cache: KVCache,
    layer: jax.Array | int,
    scale: float,
    scores_and_values: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Softmax over the filled slots, block by block (Milakov and Gimelshein, 2018).

    The number of blocks follows the longest row, so an empty cache costs nothing; it is one
    program all the same.
    """
    T, S = q_pe_BTNP.shape[1], cache.k_pe_LBSP.shape[2]
    block = min(S, KEY_BLOCK)
    last_BT = cache.length_B[:, None] + jnp.arange(T)
    dtype = q_pe_BTNP.dtype

    def one_block(j: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = jnp.minimum(j * block, S - block)  # the last block may overlap the one before
        c_kv, k_pe = read_cache(cache, layer, start, block, dtype)
        scores, values = scores_and_values(c_kv)
        scores += jnp.einsum("btnp,bsp->bnts", q_pe_BTNP, k_pe, preferred_element_type=jnp.float32)
        slots = start + jnp.arange(block)
        seen_BTS = (slots <= last_BT[..., None]) & (slots >= j * block)
        scores = jnp.where(seen_BTS[:, None], scores * scale, LEAST)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
        by_head = "bsnx" if values.ndim == 4 else "bsx"
        out = jnp.einsum(
            f"bnts,{by_head}->bntx",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return top, weights.sum(-1), out

    def add_block(j: jax.Array, before: Any) -> Any:
        now = one_block(j)
        top = jnp.maximum(before[0], now[0])
        old, new = jnp.exp(before[0] - top), jnp.exp(now[0] - top)
        total = before[1] * old + now[1] * new
        return top, total, before[2] * old[..., None] + now[2] * new[..., None]

    sums = one_block(0)
    if block < S:
        filled = jnp.minimum(last_BT.max() + 1, S)
        with jax.named_scope(CACHE_BLOCKS):
            sums = jax.lax.fori_loop(1, -(-filled // block), add_block, sums)
    _, total, out = sums
    return jnp.moveaxis(out / total[..., None], 1, 2).astype(dtype)


# (x, positions, cache, layer) -> (out, cache)
Attention = Callable[..., tuple[jax.Array, KVCache | None]]


class MLA(ParamModule):
    """Multi-head Latent Attention; parameter names are those of DeepSeek's inference code."""

    whole_rows: bool = False
    """See ``DeepSeekV3``."""

    @nn.compact
    def __call__(self) -> Attention:
        """The layer as a function.

        Expanded over the row itself, or absorbed over a cache, to which the row is added.
        """
        c, precision = self.config, self.precision
        N, C, O = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
        D, R, P = c.hidden_size, c.kv_lora_rank, c.qk_rope_head_dim
        first_q, queries = self._queries()
        wkv_a_DX = self.weight("wkv_a", (D, R + P), ("embed", "latent_out"))
        kv_norm_R = self.scale("kv_norm", R)
        wkv_b_RNX = self.weight("wkv_b", (R, N, C + O), ("latent_in", "heads", "head_dim"))
        wo_NOD = self.weight("wo", (N, O, D), ("heads", "head_dim", "embed"))

        def expand(c_kv_BSR: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Every head's keys without position, and its values (Eqs. 2 and 5)."""
            if isinstance(wkv_b_RNX, Quantized):  # a block of its scales may belong to both
                kv_BSNX = linear(c_kv_BSR, wkv_b_RNX, precision)
                return kv_BSNX[..., :C], kv_BSNX[..., C:]
            # Two products: as halves of one, keys and values would be copied out of it, and their
            # gradients into one.
            halves = wkv_b_RNX[..., :C], wkv_b_RNX[..., C:]
            k_nope, v = (linear(c_kv_BSR, w, precision) for w in halves)
            return k_nope, v

        @jax.named_scope("mla")
        def attention(
            x_BTD: Float[Array, "B T D"],
            positions: Positions,
            cache: KVCache | None = None,
            layer: Int[Array, ""] | int = 0,
        ) -> tuple[Float[Array, "B T D"], KVCache | None]:
            of_q, latent = linears(x_BTD, (first_q, wkv_a_DX), precision)  # Eqs. 6, 1 and 3
            q_BTNH = rotate_last(queries(of_q), positions.cos_BTp, positions.sin_BTp)
            latent = checkpoint_name(latent, "mla_latent")
            # Only c_kv is normalised; k_pe is shared by all heads.
            c_kv_BTR = rms_norm(latent[..., :R], kv_norm_R, LATENT_NORM_EPS)
            k_pe_BTNP = apply_rope(latent[:, :, None, R:], positions.cos_BTp, positions.sin_BTp)
            if cache is None:
                # Over several devices per row the latents are gathered, not the heads: R + P
                # numbers a token instead of N (H + O).
                c_kv = sharding.all_gather(c_kv_BTR, "sequence", 1)
                k_pe = sharding.all_gather(k_pe_BTNP, "sequence", 1)
                k_nope, v = expand(c_kv)
                k_pe = jnp.broadcast_to(k_pe, (*k_nope.shape[:3], P))
                k = jnp.concatenate([k_nope, k_pe], axis=-1)
                first = sharding.part_index("sequence") * x_BTD.shape[1]
                segments = None
                if not self.whole_rows:
                    own_BT = positions.segment_ids_BT
                    segments = own_BT, sharding.all_gather(own_BT, "sequence", 1)
                out = attend(q_BTNH, k, v, segments, first, c.softmax_scale)
            else:
                cache = write_cache(cache, layer, c_kv_BTR, k_pe_BTNP[:, :, 0])
                q_pe_BTNP = q_BTNH[..., C:]
                if x_BTD.shape[1] * (2 * R + P - C - P - O) > R * (C + O):
                    # Unfolding a slot costs R (C + O) a head, and then saves this for each query.
                    out = attend_expanded(
                        q_BTNH[..., :C],
                        q_pe_BTNP,
                        cache,
                        layer,
                        c.softmax_scale,
                        expand,
                    )
                else:
                    unfold = wkv_b_RNX
                    if isinstance(unfold, Quantized):
                        unfold = dequantized(unfold, 1, precision.compute_dtype)
                    q_nope = dot("btnc,rnc->btnr", q_BTNH[..., :C], unfold[..., :C], precision)
                    out = attend_absorbed(q_nope, q_pe_BTNP, cache, layer, c.softmax_scale)
                    out = dot("btnr,rno->btno", out, unfold[..., C:], precision)
            out = linear(out, wo_NOD, precision, contracted=2)  # Eq. 11
            return sharding.psum(out, "heads"), cache

        return attention

    def _queries(self) -> tuple[Weight, Callable[[jax.Array], jax.Array]]:
        """The first matrix from x to the queries, and from its product to ``q_BTNH`` (Eqs. 6-8).

        It is the only one where there is no ``q_lora_rank``.
        """
        c = self.config
        D, Q, N, H = c.hidden_size, c.q_lora_rank, c.num_attention_heads, c.qk_head_dim
        if Q is None:
            wq_DNH = self.weight("wq", (D, N, H), ("embed", "heads", "head_dim"))
            return wq_DNH, lambda q_BTNH: q_BTNH
        wq_a_DQ = self.weight("wq_a", (D, Q), ("embed", "latent_out"))
        q_norm_Q = self.scale("q_norm", Q)
        wq_b_QNH = self.weight("wq_b", (Q, N, H), ("latent_in", "heads", "head_dim"))

        def queries(c_q_BTQ: jax.Array) -> jax.Array:
            c_q_BTQ = checkpoint_name(c_q_BTQ, "mla_latent")
            c_q_BTQ = rms_norm(c_q_BTQ, q_norm_Q, LATENT_NORM_EPS)
            return linear(c_q_BTQ, wq_b_QNH, self.precision)

        return wq_a_DQ, queries


def write_cache(
    cache: KVCache,
    layer: Int[Array, ""] | int,
    c_kv_BTR: Float[Array, "B T R"],
    k_pe_BTP: Float[Array, "B T P"],
) -> KVCache:
    """The cache with T new tokens per row in one layer, from slot ``length_B`` on.

    Written into the stack of all layers, which a loop over layers carries: as its input and
    output it would be copied whole for every token. Slots outside the cache are not written.
    """
    B, T, _ = c_kv_BTR.shape
    slots_BT = cache.length_B[:, None] + jnp.arange(T)
    slots_BT = jnp.where(slots_BT < 0, cache.k_pe_LBSP.shape[2], slots_BT)  # -1 is not the last

    def put(old_LBSX: jax.Array, new_BTX: jax.Array) -> jax.Array:
        at = old_LBSX.at[layer, jnp.arange(B)[:, None], slots_BT]
        return at.set(new_BTX.astype(old_LBSX.dtype), mode="drop", unique_indices=True)

    scale_LBSG = cache.scale_LBSG
    if scale_LBSG is not None:
        quantized = quantize_tiles(c_kv_BTR.reshape(B * T, -1))
        c_kv_BTR = quantized.values.reshape(c_kv_BTR.shape)
        scale_LBSG = put(scale_LBSG, quantized.scale.T.reshape(B, T, -1))
    return cache._replace(
        c_kv_LBSR=put(cache.c_kv_LBSR, c_kv_BTR),
        k_pe_LBSP=put(cache.k_pe_LBSP, k_pe_BTP),
        scale_LBSG=scale_LBSG,
    )


def read_cache(
    cache: KVCache, layer: Int[Array, ""] | int, start: Int[Array, ""] | int, size: int, dtype: Any
) -> tuple[Float[Array, "B s R"], Float[Array, "B s P"]]:
    """One layer's ``size`` slots from ``start`` on, of every row."""

    def take(x_LBSX: jax.Array) -> jax.Array:
        B, X = x_LBSX.shape[1], x_LBSX.shape[3]
        return jax.lax.dynamic_slice(x_LBSX, (layer, 0, start, 0), (1, B, size, X))[0]

    c_kv, k_pe = take(cache.c_kv_LBSR), take(cache.k_pe_LBSP)
    if cache.scale_LBSG is not None:
        scale = jnp.repeat(take(cache.scale_LBSG), TILE, axis=-1)[..., : c_kv.shape[-1]]
        c_kv = c_kv.astype(jnp.float32) * scale
    return c_kv.astype(dtype), k_pe.astype(dtype)
