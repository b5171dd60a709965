"""The whole model: embedding, dense layers, MoE layers, head, MTP modules (V3 section 2)."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deepseek_jax import sharding
from deepseek_jax.config import FLOAT32, ModelConfig, Precision, RematPolicy
from deepseek_jax.model.attention import CUDNN_ATTENTION, MLA, Positions
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.model.layers import (
    GATHERED,
    STACKS,
    FeedForward,
    LogicalAxes,
    ParamModule,
    contract,
    left_in_stacks,
    lookup,
    rms_norm,
    tokens_whole,
)
from deepseek_jax.model.moe import Balance, LayerInput, LayerReport, MoE, balance
from deepseek_jax.model.mtp import MTPModule, shift_left
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.types import KVCache, Params

# What the "selective" policy keeps for the backward pass: what is dear to compute and small to
# keep. RMSNorm, the MLA up-projections and SwiGLU are computed again (V3 section 3.2.3), and so is
# every step between two of these names, the residual stream being one.
_KEPT = (
    "mla_latent",
    "mla_heads",
    "attended",
    "router",
    "dispatch",
    "ffn_gate_up",
    "fp8_gate_up",
)


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
    whole_rows: bool = False
    """See ``DeepSeekV3``."""

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T D"], KVCache | None],
        layer: LayerInput,
        positions: Positions,
    ) -> tuple[tuple[Float[Array, "B T D"], KVCache | None], LayerReport | None]:
        """``carry`` is the residual stream, and the cache of all layers where there is one."""
        c, precision = self.config, self.precision
        D, eps = c.hidden_size, c.rms_norm_eps
        x_BTD, cache = carry
        attention = MLA(c, precision, self.whole_rows, name="attn")()
        attn_norm_D, ffn_norm_D = self.scale("attn_norm", D), self.scale("ffn_norm", D)
        parts = [(x_BTD, positions, layer.experts_BTK)]
        if self.use_moe and self.parallel.overlap and sharding.parts("expert") > 1:
            self.parallel.check_rows(len(x_BTD))
            parts = _halves(parts[0])
        states, inputs = [], []
        for x, where, _ in parts:
            normed = rms_norm(x, attn_norm_D, eps)
            attended, cache = attention(normed, where, cache, layer.layer)
            states.append(checkpoint_name(x + attended, "attended"))
            inputs.append(rms_norm(states[-1], ffn_norm_D, eps))
        if self.use_moe:
            assert layer.bias_E is not None
            moe = MoE(c, precision, self.parallel, name="moe")()
            outs, routing = moe(layer.bias_E, inputs, [chosen for _, _, chosen in parts])
            loads = balance(routing, positions.segment_ids_BT > 0, c)
            report = LayerReport(loads, routing.experts_BTK)
        else:
            ffn = FeedForward(c, precision, width=c.intermediate_size, name="ffn")()
            outs, report = [ffn(x) for x in inputs], None
        x_BTD = jnp.concatenate([x + out for x, out in zip(states, outs, strict=True)])
        return (x_BTD, cache), report


Part = tuple[jax.Array, Positions, jax.Array | None]


def _halves(part: Part) -> list[Part]:
    """This device's rows in two parts, neither of which waits for the other.

    So one half's tokens can travel while the other half computes (V3 sections 3.2.1 and 3.4.2):
    the compiler's scheduler places the transfers, since nothing orders them.
    """
    B = len(part[0])
    return [jax.tree.map(lambda a, i=i: a[i : i + B // 2], part) for i in (0, B // 2)]


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Policy "none": weights gathered from other devices are gathered again, all else is kept."""
    return primitive.name != "all_gather" and params.get("name") != GATHERED


def _dear(primitive: Any, *_: Any, **params: Any) -> bool:
    """Policy "selective"."""
    return primitive is CUDNN_ATTENTION or params.get("name") in _KEPT


def _remat(block: type[Block], policy: RematPolicy) -> type[Block]:
    policies: dict[RematPolicy, Any] = {
        "none": _all_but_gathered,
        "selective": _dear,
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
    whole_rows: bool = False
    """Every row is one segment, padded at its end if at all. Then causality is all the mask that
    attention needs, and cuDNN is three times as fast with none. Segments still say what is padding.
    """

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
            variable_broadcast=STACKS,
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if dense := c.first_k_dense_replace:
            self.dense_layers = stack(length=dense)(c, self.precision, whole_rows=self.whole_rows)
        moe = {"use_moe": True, "parallel": self.parallel, "whole_rows": self.whole_rows}
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
        experts_LBTK: Int[Array, "l B T K"] | None = None,
    ) -> Hidden:
        """The stack without the head.

        Args:
            tokens_BT: ids.
            router_bias_LE: selection biases, see ``TrainState``.
            next_BT: token i+1 at position i; None leaves the MTP modules out.
            segment_ids_BT: attention stays within a segment; 0 is padding. Default: all 1.
            positions_BT: RoPE positions. Default: 0, 1, 2, ...
            experts_LBTK: experts chosen before, of the MoE layers of the main model.
        """
        c = self.config
        B, T = tokens_BT.shape
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones((B, T), jnp.int32)
        if positions_BT is None:
            first = sharding.part_index("sequence") * T
            positions_BT = jnp.broadcast_to(first + jnp.arange(T), (B, T))
        positions = Positions(*rope_tables(c, positions_BT), segment_ids_BT)

        h_BTD, _, report = self._stack(
            self._embed(tokens_BT), router_bias_LE, positions, None, experts_LBTK
        )
        main_BTD = h_BTD = rms_norm(h_BTD, self.norm_D, c.rms_norm_eps)
        loads, losses, mtp_BTD = [report.balance.load_E], [report.balance.loss.sum()], []
        for k, module in enumerate(self.mtp if next_BT is not None else []):
            assert next_BT is not None
            layer = LayerInput(router_bias_LE[c.num_moe_layers + k])
            next_embedding = self._embed(shift_left(next_BT, k))
            h_BTD, _, report = module(h_BTD, next_embedding, layer, positions)
            loads.append(report.balance.load_E[None])
            losses.append(report.balance.loss)
            mtp_BTD.append(h_BTD)
        total = Balance(jnp.concatenate(loads), sum(losses, jnp.float32(0))).over_mesh()
        return Hidden(main_BTD, tuple(mtp_BTD), total.load_E, total.loss)

    def extend(
        self, tokens_BT: Int[Array, "B T"], router_bias_LE: Float[Array, "L E"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache, Int[Array, "l B T K"]]:
        """T further tokens per row: final-normed states, the cache with them in it, experts.

        The experts are those that each MoE layer of the main model chose.
        """
        positions = self._cached_positions(cache, tokens_BT.shape[1])
        h_BTD, filled, report = self._stack(
            self._embed(tokens_BT), router_bias_LE, positions, cache, None
        )
        assert filled is not None
        normed = rms_norm(h_BTD, self.norm_D, self.config.rms_norm_eps)
        filled = filled._replace(length_B=cache.length_B + tokens_BT.shape[1])
        return normed, filled, report.experts_BTK

    def decode(
        self, tokens_BT: Int[Array, "B T"], router_bias_LE: Float[Array, "L E"], cache: KVCache
    ) -> tuple[Float[Array, "B T V"], KVCache]:
        """Logits of T further tokens per row, and the cache with them in it (absorbed MLA)."""
        normed, cache, _ = self.extend(tokens_BT, router_bias_LE, cache)
        return self.logits(normed), cache

    def draft(
        self,
        h_BTD: Float[Array, "B T D"],
        next_BT: Int[Array, "B T"],
        router_bias_LE: Float[Array, "L E"],
        cache: KVCache,
        depth: int,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """MTP module ``depth`` (from 1) over its cache, whose layers are the modules.

        ``h_BTD`` are the normed states of depth - 1, ``next_BT`` the tokens ``depth`` further on.
        The lengths of the cache stay: the modules share them.
        """
        bias_E = router_bias_LE[self.config.num_moe_layers + depth - 1]
        positions = self._cached_positions(cache, h_BTD.shape[1])
        layer = LayerInput(bias_E, layer=depth - 1)
        h_BTD, filled, _ = self.mtp[depth - 1](h_BTD, self._embed(next_BT), layer, positions, cache)
        assert filled is not None
        return h_BTD, filled

    def _cached_positions(self, cache: KVCache, tokens: int) -> Positions:
        positions_BT = cache.length_B[:, None] + jnp.arange(tokens)
        tables = rope_tables(self.config, positions_BT)
        return Positions(*tables, jnp.ones(positions_BT.shape, jnp.int32))

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The output head, shared by the main model and every MTP depth."""
        head_DV = self.head_DV.astype(hidden_BTD.dtype)
        out = contract(hidden_BTD, head_DV, 1, self.precision.accumulate)
        return sharding.all_gather(out.astype(self.precision.logits), "vocab", 2)

    def head(self) -> Float[Array, "D V"]:
        """The output head as the loss wants it; per device, its part of the vocabulary."""
        return self.head_DV

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        here = self.embed_VD.shape[0]
        if here == self.config.vocab_size:
            return tokens_whole(lookup(self.embed_VD, tokens_BT))
        local_BT = tokens_BT - sharding.part_index("vocab") * here
        own_BT1 = ((local_BT >= 0) & (local_BT < here))[..., None]
        rows = lookup(self.embed_VD, jnp.clip(local_BT, 0, here - 1))
        return tokens_whole(sharding.psum(jnp.where(own_BT1, rows, 0), "vocab"))

    def _stack(
        self,
        x_BTD: jax.Array,
        router_bias_LE: jax.Array,
        positions: Positions,
        cache: KVCache | None,
        experts_LBTK: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None, LayerReport]:
        """All layers; the reports of those with experts come back stacked."""
        c = self.config
        dense, moe = c.first_k_dense_replace, c.num_moe_layers
        carry = (x_BTD, cache)
        report: Any = LayerReport(
            Balance(jnp.zeros((0, c.n_routed_experts), jnp.int32), jnp.zeros((0,))),
            jnp.zeros((0, *x_BTD.shape[:2], c.num_experts_per_tok), jnp.int32),
        )
        if dense:
            carry, _ = self.dense_layers(carry, LayerInput(layer=jnp.arange(dense)), positions)
        if moe:
            layers = LayerInput(router_bias_LE[:moe], experts_LBTK, dense + jnp.arange(moe))
            carry, report = self.moe_layers(carry, layers, positions)
        return *carry, report


# --- parameters ------------------------------------------------------------------------------


def serving_variables(model: DeepSeekV3, params: Params) -> dict[str, Params]:
    """What ``apply`` takes for ``extend``, with FP8 matrices read where they lie.

    Not on a mesh, which may cut a matrix inside its blocks.
    """
    if model.precision.matmuls != "fp8" or not jax.sharding.get_abstract_mesh().empty:
        return {"params": params}
    kept, stacks = dict(params), {}
    for name in ("dense_layers", "moe_layers"):
        if name in params:
            kept[name], stacks[name] = left_in_stacks(params[name])
    return {"params": kept, STACKS: stacks}


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
    """The logical axes of every parameter, as tuples (see ``sharding.COMPUTE`` and ``STORED``)."""
    return jax.tree.map(
        lambda box: tuple(box.names),
        _abstract_boxed(model),
        is_leaf=lambda x: isinstance(x, LogicalAxes),
    )


def init_cache(
    config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float32, *, mtp: bool = False
) -> KVCache:
    """An empty cache of ``slots`` tokens per row; of the MTP modules if so asked.

    ``float8_e4m3fn`` holds the latents in FP8 with a float32 scale for each 128 of them; the
    rotated keys, which all heads depend on, stay in bfloat16.
    """
    layers = config.num_nextn_predict_layers if mtp else config.num_hidden_layers
    rows, R = (layers, batch, slots), config.kv_lora_rank
    fp8 = jnp.dtype(dtype) == jnp.float8_e4m3fn
    return KVCache(
        jnp.zeros((*rows, R), dtype),
        jnp.zeros((*rows, config.qk_rope_head_dim), jnp.bfloat16 if fp8 else dtype),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((*rows, -(-R // 128))) if fp8 else None,
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


def cache_specs(cache: KVCache) -> KVCache:
    """Rows over the batch axes."""
    return jax.tree.map(
        lambda x: sharding.spec("batch") if x.ndim == 1 else sharding.spec("layers", "batch"), cache
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
        variables = serving_variables(model, params)
        return model.apply(variables, tokens_BT, bias_LE, cache, method="decode")

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(tokens_BT) % sharding.batch_shards(mesh):
        out = decode(params, router_bias_LE, tokens_BT, cache)
    else:
        specs = sharding.param_specs(mesh, logical_axes(model), params, stored=False)
        rows = sharding.spec("batch")
        per_device = sharding.per_device(
            decode,
            in_specs=(specs, sharding.spec(), rows, cache_specs(cache)),
            out_specs=(rows, cache_specs(cache)),
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
