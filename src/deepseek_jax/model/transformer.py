"""The whole model: embedding, dense layers, MoE layers, head, MTP modules (V3 section 2)."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deepseek_jax import sharding
from deepseek_jax.config import FLOAT32, ModelConfig, Precision, RematPolicy
from deepseek_jax.model.attention import MLA, LayerCache, Positions
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.model.layers import (
    GATHERED,
    FeedForward,
    LogicalAxes,
    ParamModule,
    rms_norm,
)
from deepseek_jax.model.moe import Balance, MoE, balance
from deepseek_jax.model.mtp import MTPModule, shift_left
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.types import KVCache, Params

# What the "selective" policy keeps for the backward pass: outputs of the expensive matmuls.
# RMSNorm, the MLA up-projections, the router and SwiGLU are computed again (V3 section 3.2.3).
_KEPT = ("mla_latent", "mla_heads", "ffn_gate", "ffn_up")


class Hidden(NamedTuple):
    """What the stack computes, before any logits exist."""

    main_BTD: Float[Array, "B T D"]
    """Final-normed state: the head turns it into logits of token i+1."""
    mtp_BTD: tuple[Float[Array, "B T D"], ...]
    """Depth k's normed state (index k-1): the head turns it into logits of token i+1+k."""
    load_LE: Int[Array, "L E"]
    """Tokens per expert; rows as in ``router_bias_LE``."""
    balance_loss: Float[Array, ""]
    """Sum over layers of the weighted balance losses."""


class Output(NamedTuple):
    """Logits of every depth."""

    logits_BTV: Float[Array, "B T V"]
    """Next-token logits."""
    mtp_logits: tuple[Float[Array, "B _ V"], ...]
    """Depth k (index k-1) predicts token i+1+k for the first T-k positions."""


class Block(ParamModule):
    """Pre-norm residual block: MLA, then a dense FFN or DeepSeekMoE."""

    use_moe: bool = False
    parallel: ExpertParallel = ExpertParallel()

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        per_layer: tuple[Float[Array, "E"] | None, LayerCache | None],
        positions: Positions,
        first_B: Int[Array, "B"] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache | None, Balance | None]]:
        """``per_layer`` is this layer's router bias and cache; both may be absent."""
        c, precision = self.config, self.precision
        D, eps = c.hidden_size, c.rms_norm_eps
        bias_E, cache = per_layer
        attention = MLA(c, precision, name="attn")()
        attn_norm_D, ffn_norm_D = self.scale("attn_norm", D), self.scale("ffn_norm", D)
        parts = [(x_BTD, positions)]
        if self.use_moe and self.parallel.overlap and sharding.parts("expert") > 1:
            self.parallel.check_rows(len(x_BTD))
            parts = _halves(x_BTD, positions)
        states, inputs = [], []
        for x, where in parts:
            normed = rms_norm(x, attn_norm_D, eps)
            attended, cache = attention(normed, where, cache, first_B)
            states.append(x + attended)
            inputs.append(rms_norm(states[-1], ffn_norm_D, eps))
        if self.use_moe:
            assert bias_E is not None
            outs, routing = MoE(c, precision, self.parallel, name="moe")()(bias_E, *inputs)
            report = balance(routing, positions.segment_ids_BT > 0, c)
        else:
            ffn = FeedForward(c, precision, width=c.intermediate_size, name="ffn")()
            outs, report = [ffn(x) for x in inputs], None
        x_BTD = jnp.concatenate([x + out for x, out in zip(states, outs, strict=True)])
        return x_BTD, (cache, report)


def _halves(x_BTD: jax.Array, positions: Positions) -> list[tuple[jax.Array, Positions]]:
    """This device's rows in two parts, neither of which waits for the other.

    So one half's tokens can travel while the other half computes (V3 sections 3.2.1 and 3.4.2):
    the compiler's scheduler places the transfers, since nothing orders them.
    """
    B = len(x_BTD)
    return [jax.tree.map(lambda a, i=i: a[i : i + B // 2], (x_BTD, positions)) for i in (0, B // 2)]


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Policy "none": weights gathered from other devices are gathered again, all else is kept."""
    return primitive.name != "all_gather" and params.get("name") != GATHERED


def _remat(block: type[Block], policy: RematPolicy) -> type[Block]:
    policies: dict[RematPolicy, Any] = {
        "none": _all_but_gathered,
        "selective": jax.checkpoint_policies.save_only_these_names(*_KEPT),
        "full": None,
    }
    # prevent_cse guards against XLA undoing the recomputation; inside a scan it cannot.
    return nn.remat(block, prevent_cse=False, policy=policies[policy])


class DeepSeekV3(ParamModule):
    """A DeepSeek-V2/V3-family language model.

    ``apply({"params": params}, tokens_BT, router_bias_LE)`` returns the logits (``Output``);
    ``method="hidden"`` stops before the head, which training wants since logits of a whole
    batch do not fit; ``method="decode"`` works on a ``KVCache``.
    """

    precision: Precision = Precision()
    remat: RematPolicy = "none"
    parallel: ExpertParallel = ExpertParallel()

    def setup(self) -> None:
        """Declare parameters; the two layer stacks are scanned, so compile time is flat."""
        c = self.config
        V, D = c.vocab_size, c.hidden_size
        # V3 section 3.3.1: embedding and head are not in FP8.
        dtype = self.precision.compute_dtype
        self.embed_VD = self.weight("embed", (V, D), ("vocab", "embed"), dtype)
        self.norm_D = self.scale("norm", D)
        self.head_DV = self.weight("head", (D, V), ("embed", "vocab"), dtype)
        block = _remat(Block, self.remat)
        stack = functools.partial(
            nn.scan,
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if dense := c.first_k_dense_replace:
            self.dense_layers = stack(length=dense)(c, self.precision)
        moe = {"use_moe": True, "parallel": self.parallel}
        if c.num_moe_layers:
            self.moe_layers = stack(length=c.num_moe_layers)(c, self.precision, **moe)
        self.mtp = [
            MTPModule(c, self.precision, block=functools.partial(block, **moe))
            for _ in range(c.num_nextn_predict_layers)
        ]

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        router_bias_LE: Float[Array, "L E"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> Output:
        """Logits of the next token, and of the ones after it from the MTP modules."""
        next_BT = shift_left(tokens_BT, 1)
        hidden = self.hidden(tokens_BT, router_bias_LE, next_BT, segment_ids_BT, positions_BT)
        return Output(
            self.logits(hidden.main_BTD),
            tuple(self.logits(h[:, : -1 - k]) for k, h in enumerate(hidden.mtp_BTD)),
        )

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        router_bias_LE: Float[Array, "L E"],
        next_BT: Int[Array, "B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> Hidden:
        """The stack without the head.

        Args:
            tokens_BT: ids.
            router_bias_LE: selection biases, see ``TrainState``.
            next_BT: token i+1 at position i; None leaves the MTP modules out.
            segment_ids_BT: attention stays within a segment; 0 is padding. Default: all 1.
            positions_BT: RoPE positions. Default: 0, 1, 2, ...
        """
        c = self.config
        B, T = tokens_BT.shape
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones((B, T), jnp.int32)
        if positions_BT is None:
            first = sharding.part_index("sequence") * T
            positions_BT = jnp.broadcast_to(first + jnp.arange(T), (B, T))
        positions = Positions(*rope_tables(c, positions_BT), segment_ids_BT)

        h_BTD, _, balance = self._stack(
            self._embed(tokens_BT), router_bias_LE, None, positions, None
        )
        main_BTD = h_BTD = rms_norm(h_BTD, self.norm_D, c.rms_norm_eps)
        loads, losses, mtp_BTD = [balance.load_E], [balance.loss.sum()], []
        for k, module in enumerate(self.mtp if next_BT is not None else []):
            assert next_BT is not None
            bias_E = router_bias_LE[c.num_moe_layers + k]
            next_embedding = self._embed(shift_left(next_BT, k))
            h_BTD, balance = module(h_BTD, next_embedding, bias_E, positions)
            loads.append(balance.load_E[None])
            losses.append(balance.loss)
            mtp_BTD.append(h_BTD)
        balance = Balance(jnp.concatenate(loads), sum(losses, jnp.float32(0))).over_mesh()
        return Hidden(main_BTD, tuple(mtp_BTD), balance.load_E, balance.loss)

    def decode(
        self, tokens_BT: Int[Array, "B T"], router_bias_LE: Float[Array, "L E"], cache: KVCache
    ) -> tuple[Float[Array, "B T V"], KVCache]:
        """Logits of T further tokens per row, and the cache with them in it (absorbed MLA)."""
        B, T = tokens_BT.shape
        positions_BT = cache.length_B[:, None] + jnp.arange(T)
        positions = Positions(*rope_tables(self.config, positions_BT), jnp.ones((B, T), jnp.int32))
        layers = LayerCache(cache.c_kv_LBSR, cache.k_pe_LBSP)
        h_BTD, layers, _ = self._stack(
            self._embed(tokens_BT), router_bias_LE, layers, positions, cache.length_B
        )
        assert layers is not None
        normed = rms_norm(h_BTD, self.norm_D, self.config.rms_norm_eps)
        return self.logits(normed), KVCache(*layers, cache.length_B + T)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The output head, shared by the main model and every MTP depth."""
        out = jnp.einsum(
            "btd,dv->btv",
            hidden_BTD,
            self.head_DV.astype(hidden_BTD.dtype),
            preferred_element_type=jnp.dtype(self.precision.accumulate),
        )
        return sharding.all_gather(out.astype(self.precision.logits), "vocab", 2)

    def head(self) -> Float[Array, "D V"]:
        """The output head as the loss wants it; per device, its part of the vocabulary."""
        return self.head_DV

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        here = self.embed_VD.shape[0]
        if here == self.config.vocab_size:
            return self.embed_VD[tokens_BT]
        local_BT = tokens_BT - sharding.part_index("vocab") * here
        own_BT1 = ((local_BT >= 0) & (local_BT < here))[..., None]
        rows = self.embed_VD[jnp.clip(local_BT, 0, here - 1)]
        return sharding.psum(jnp.where(own_BT1, rows, 0), "vocab")

    def _stack(
        self,
        x_BTD: jax.Array,
        router_bias_LE: jax.Array,
        cache: LayerCache | None,
        positions: Positions,
        first_B: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None, Balance]:
        """All layers; the cache and the balances come back stacked over layers."""
        c = self.config
        dense, caches = c.first_k_dense_replace, []
        balance: Any = Balance(jnp.zeros((0, c.n_routed_experts), jnp.int32), jnp.zeros((0,)))
        if dense:
            part = None if cache is None else LayerCache(*(x[:dense] for x in cache))
            x_BTD, (part, _) = self.dense_layers(x_BTD, (None, part), positions, first_B)
            caches.append(part)
        if c.num_moe_layers:
            part = None if cache is None else LayerCache(*(x[dense:] for x in cache))
            bias = router_bias_LE[: c.num_moe_layers]
            x_BTD, (part, balance) = self.moe_layers(x_BTD, (bias, part), positions, first_B)
            caches.append(part)
        if cache is not None:
            cache = LayerCache(*(jnp.concatenate(x) for x in zip(*caches, strict=True)))
        return x_BTD, cache, balance


# --- parameters ------------------------------------------------------------------------------


def _abstract_boxed(model: DeepSeekV3) -> Any:
    """Shapes and logical axes of all parameters; no device is asked for anything."""
    config = model.config

    def boxed() -> Any:
        # Long enough for one position of every MTP depth.
        tokens = jnp.zeros((1, 2 + config.num_nextn_predict_layers), jnp.int32)
        return model.init(jax.random.key(0), tokens, init_router_bias(config))["params"]

    return jax.eval_shape(boxed)


def init_router_bias(config: ModelConfig) -> Float[Array, "L E"]:
    """Selection biases at the start of training: zero."""
    return jnp.zeros((config.num_routers, config.n_routed_experts), jnp.float32)


def init_params(model: DeepSeekV3, key: PRNGKeyArray) -> Params:
    """Random parameters as a plain nested dict; call it under ``jax.jit`` to shard the result.

    One matrix is drawn at a time (on a mesh: those of all experts of one layer): the random bits
    of all of them at once would take more memory than the parameters.
    """
    axes, std = logical_axes(model), model.config.initializer_range
    leaves, treedef = jax.tree.flatten(abstract_params(model))
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    drawn: list[jax.Array] = []
    for index, (leaf, axis_names) in enumerate(zip(leaves, names, strict=True)):
        if axis_names[-1] == "norm":
            drawn.append(jnp.ones(leaf.shape, leaf.dtype))
            continue
        own = jax.random.fold_in(key, index)
        if drawn:  # not before the last one is finished
            own, _ = jax.lax.optimization_barrier((own, drawn[-1].ravel()[0]))
        drawn.append(_draw(own, axis_names, leaf.shape, std).astype(leaf.dtype))
    return jax.tree.unflatten(treedef, drawn)


def _draw(
    key: jax.Array, names: tuple[str | None, ...], shape: tuple[int, ...], std: float
) -> jax.Array:
    """N(0, std^2); every layer and every expert from its own key, one after the other."""
    if names[0] not in ("layers", "expert"):
        return std * jax.random.normal(key, shape)
    keys = jax.random.split(key, shape[0])
    together = names[0] == "expert" and not jax.sharding.get_abstract_mesh().empty
    loop = jax.vmap if together else lambda f: functools.partial(jax.lax.map, f)
    return loop(lambda k: _draw(k, names[1:], shape[1:], std))(keys)


def abstract_params(model: DeepSeekV3) -> Params:
    """Shapes and dtypes of ``init_params``, nothing allocated."""
    return nn.meta.unbox(_abstract_boxed(model))


def logical_axes(model: DeepSeekV3) -> Params:
    """The logical axes of every parameter, as tuples (see ``sharding.RULES``)."""
    return jax.tree.map(
        lambda box: tuple(box.names),
        _abstract_boxed(model),
        is_leaf=lambda x: isinstance(x, LogicalAxes),
    )


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
    """An empty cache of ``slots`` tokens per row."""
    L, R, P = config.num_hidden_layers, config.kv_lora_rank, config.qk_rope_head_dim
    return KVCache(
        jnp.zeros((L, batch, slots, R), dtype),
        jnp.zeros((L, batch, slots, P), dtype),
        jnp.zeros((batch,), jnp.int32),
    )


def sharded_params(model: DeepSeekV3, mesh: Mesh, *, stored: bool = True) -> Params:
    """``abstract_params``, each leaf with its place on the mesh: what a loader fills.

    ``stored=False`` is for serving: weights lie as computation wants them, so that a decode
    step, which reads every weight for a few tokens, gathers none.
    """
    shapes = abstract_params(model)
    where = sharding.param_shardings(mesh, logical_axes(model), shapes, stored=stored)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )


CACHE_SPECS = KVCache(
    sharding.spec("layers", "batch"), sharding.spec("layers", "batch"), sharding.spec("batch")
)


def decode_step(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    tokens_BT: Int[Array, "B T"],
    cache: KVCache,
) -> tuple[Float[Array, "B T V"], KVCache]:
    """``DeepSeekV3.decode``; per device under a mesh that divides the rows, else global.

    For serving on a mesh place the parameters by ``sharded_params(..., stored=False)``. Left to
    itself, as in global mode, the compiler gathers all experts on every device.
    """

    def decode(params, bias_LE, tokens_BT, cache):
        return model.apply({"params": params}, tokens_BT, bias_LE, cache, method="decode")

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(tokens_BT) % sharding.batch_shards(mesh):
        out = decode(params, router_bias_LE, tokens_BT, cache)
    else:
        specs = sharding.param_specs(mesh, logical_axes(model), params, stored=False)
        rows = sharding.spec("batch")
        per_device = sharding.per_device(
            decode,
            in_specs=(specs, sharding.spec(), rows, CACHE_SPECS),
            out_specs=(rows, CACHE_SPECS),
        )
        out = per_device(params, router_bias_LE, tokens_BT, cache)
    return cast(tuple[jax.Array, KVCache], out)


class ParamCounts(NamedTuple):
    """Numbers of parameters. Selection biases are state and are not counted."""

    total: int
    """The main model, without MTP modules."""
    active: int
    """Touched by one token: K of E experts, all else, the head, but no embedding rows.

    So counted, the reports' rounded figures come out: V3 37B, V2 21B, V2-Lite 2.4B.
    """
    mtp: int
    """The MTP modules; embedding and head are the main model's and not counted again."""


def param_counts(config: ModelConfig) -> ParamCounts:
    """Count without allocating, by ``jax.eval_shape``."""
    params = abstract_params(DeepSeekV3(config))

    def size(tree: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    mtp = size([v for k, v in params.items() if k.startswith("mtp")])
    total = size(params) - mtp
    routed = 0
    if config.num_moe_layers:
        routed = size([params["moe_layers"]["moe"][w] for w in ("w1", "w2", "w3")])
    E, K = config.n_routed_experts, config.num_experts_per_tok
    return ParamCounts(total, total - routed // E * (E - K) - size(params["embed"]), mtp)


def forward(
    config: ModelConfig,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    tokens_BT: Int[Array, "B T"],
    *,
    precision: Precision = FLOAT32,
) -> Float[Array, "B T V"]:
    """Next-token logits in one call. For the MTP logits too, use ``DeepSeekV3.apply``."""
    main_only = config.replace(num_nextn_predict_layers=0)
    model = DeepSeekV3(main_only, precision)
    params = {name: value for name, value in params.items() if not name.startswith("mtp")}
    output = model.apply({"params": params}, tokens_BT, router_bias_LE)
    return cast(Output, output).logits_BTV
