"""DeepSeekMoE: routing (V3 section 2.1.2; V2 section 2.2), balance losses, dropless dispatch."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax import sharding
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.dispatch import Chosen, ExpertParallel, routed_experts
from deepseek_jax.model.experts import ExpertWeights
from deepseek_jax.model.layers import FeedForward, ParamModule


class Routing(NamedTuple):
    """The router's decision; a token here is one position of one row."""

    weights_BTK: Float[Array, "B T K"]
    """Gates g of the chosen experts (V3 Eq. 13)."""
    experts_BTK: Int[Array, "B T K"]
    scores_BTE: Float[Array, "B T E"]
    """Affinities s of all experts, before the bias (V3 Eq. 15)."""


class Balance(NamedTuple):
    """What a MoE layer reports beside its output; of this device's rows (see ``over_mesh``)."""

    load_E: Int[Array, "*L E"]
    """Tokens per expert, padding not counted."""
    loss: Float[Array, "*L"]
    """Balance losses, already multiplied by their alphas."""

    def over_mesh(self) -> "Balance":
        """Of the whole batch: loads added up, losses averaged over the sequences."""
        load = sharding.psum(self.load_E, "batch", "sequence")
        return Balance(load, sharding.pmean(self.loss, "batch"))


class LayerInput(NamedTuple):
    """What differs from layer to layer, beside the weights."""

    bias_E: Float[Array, "*L E"] | None = None
    """Selection biases; None for a dense layer."""
    experts_BTK: Int[Array, "*L B T K"] | None = None
    """Experts that were chosen before, see ``route``."""
    layer: Int[Array, "*L"] | int = 0
    """Its place in the cache."""


class LayerReport(NamedTuple):
    """What a layer says beside its output."""

    balance: Balance
    experts_BTK: Int[Array, "*L B T K"]


@jax.named_scope("router")
def route(
    logits_BTE: Float[Array, "B T E"],
    bias_E: Float[Array, "E"],
    config: ModelConfig,
    experts_BTK: Int[Array, "B T K"] | None = None,
) -> Routing:
    """Choose K experts per token (V3 Eqs. 12-16; V2 section 2.2.2). All in float32.

    ``bias_E`` steers the choice and never the gate. V2's methods take no bias. ``experts_BTK`` is
    a choice made before ("keep routing", V3.2 section 3.1); -1 as a token's first: none was.
    """
    v3 = config.topk_method == "noaux_tc"
    logits_BTE = logits_BTE.astype(jnp.float32)
    scores = jax.nn.sigmoid(logits_BTE) if v3 else jax.nn.softmax(logits_BTE, axis=-1)
    choice = scores + bias_E if v3 else scores
    if config.n_group > 1:
        choice = jnp.where(reachable(choice, config), choice, -jnp.inf)
    _, own_BTK = jax.lax.top_k(jax.lax.stop_gradient(choice), config.num_experts_per_tok)
    if experts_BTK is None:
        experts_BTK = own_BTK
    else:
        experts_BTK = jnp.where(experts_BTK[..., :1] < 0, own_BTK, experts_BTK)
    # Not by indices: their gradient is a scatter, a thousand times slower on a GPU than this sum.
    chosen_BTKE = experts_BTK[..., None] == jnp.arange(config.n_routed_experts)
    gates = jnp.where(chosen_BTKE, scores[..., None, :], 0).sum(-1)
    if config.norm_topk_prob:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return Routing(gates * config.routed_scaling_factor, experts_BTK, scores)


def reachable(choice_BTE: Float[Array, "B T E"], config: ModelConfig) -> Bool[Array, "B T E"]:
    """Node-limited routing: the experts in each token's best ``topk_group`` groups.

    A group's score is the sum of its two best experts in V3 (K_r/M = 2) and its best in V2.
    """
    G = config.n_group
    grouped = choice_BTE.reshape(*choice_BTE.shape[:-1], G, -1)
    best = 2 if config.topk_method == "noaux_tc" else 1
    group_scores = jax.lax.top_k(grouped, best)[0].sum(-1)
    _, kept = jax.lax.top_k(group_scores, config.topk_group)
    kept_BTG = jax.nn.one_hot(kept, G, dtype=jnp.bool_).any(-2)
    return jnp.repeat(kept_BTG, config.n_routed_experts // G, axis=-1)


@jax.named_scope("router")
def balance(routing: Routing, valid_BT: Bool[Array, "B T"], config: ModelConfig) -> Balance:
    """The load of every expert, and the balance losses of this layer."""
    E = config.n_routed_experts
    chosen_BTE = jax.nn.one_hot(routing.experts_BTK, E, dtype=jnp.float32).sum(-2)
    chosen_BTE = chosen_BTE * valid_BT[..., None]
    load_E = chosen_BTE.sum((0, 1)).astype(jnp.int32)
    if config.topk_method == "noaux_tc":
        loss = sequence_loss(routing.scores_BTE, valid_BT, config)
    else:
        loss = v2_losses(routing.scores_BTE, chosen_BTE, valid_BT, config)
    return Balance(load_E, loss)


def sequence_loss(
    scores_BTE: Float[Array, "B T E"], valid_BT: Bool[Array, "B T"], config: ModelConfig
) -> Float[Array, ""]:
    """Complementary sequence-wise balance loss (V3 Eqs. 17-20), mean over the sequences.

    As printed, f counts the top K of the *unbiased* affinities, so the loss pushes against the
    router's own imbalance and not against the one that the bias has already mended.
    """
    E, K = config.n_routed_experts, config.num_experts_per_tok
    _, top_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), K)
    counted_BTE = jax.nn.one_hot(top_BTK, E, dtype=jnp.float32).sum(-2) * valid_BT[..., None]
    share_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)  # Eq. 19
    f_BE, P_BE = _fractions(counted_BTE, share_BTE, valid_BT, config)
    return config.aux_loss_alpha * (f_BE * P_BE).sum(-1).mean()


def v2_losses(
    scores_BTE: Float[Array, "B T E"],
    chosen_BTE: Float[Array, "B T E"],
    valid_BT: Bool[Array, "B T"],
    config: ModelConfig,
) -> Float[Array, ""]:
    """Expert-, device- and communication-level losses (V2 Eqs. 23-31); groups are devices."""
    B, G = scores_BTE.shape[0], config.n_group
    f_BE, P_BE = _fractions(chosen_BTE, scores_BTE, valid_BT, config)
    loss = config.aux_loss_alpha * (f_BE * P_BE).sum(-1).mean()
    P_BG = P_BE.reshape(-1, G, config.n_routed_experts // G).sum(-1)
    if config.device_loss_alpha:
        f_BG = f_BE.reshape(*P_BG.shape, -1).mean(-1)
        loss += config.device_loss_alpha * (f_BG * P_BG).sum(-1).mean()
    if config.communication_loss_alpha:
        sent_BTG = chosen_BTE.reshape(B, -1, G, config.n_routed_experts // G).any(-1)
        tokens_BG = _per_row(sent_BTG.astype(jnp.float32), config)
        valid_B1 = _per_row(valid_BT[..., None].astype(jnp.float32), config)
        f_BG = tokens_BG * G / (config.topk_group * jnp.maximum(valid_B1, 1))
        loss += config.communication_loss_alpha * (f_BG * P_BG).sum(-1).mean()
    return loss


def _fractions(
    counted_BTE: jax.Array, share_BTE: jax.Array, valid_BT: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Eq. 18 (f: E/K times the share of tokens that chose i) and Eq. 20 (P: mean affinity)."""
    E, K = config.n_routed_experts, config.num_experts_per_tok
    tokens_B1 = jnp.maximum(_per_row(valid_BT[..., None].astype(jnp.float32), config), 1)
    f_BE = _per_row(counted_BTE, config) * E / (K * tokens_B1)
    P_BE = _per_row(share_BTE * valid_BT[..., None], config) / tokens_B1
    return jax.lax.stop_gradient(f_BE), P_BE


def _per_row(x_BTX: jax.Array, config: ModelConfig) -> jax.Array:
    """Sum within each sequence, or (``seq_aux=False``) over the micro-batch as one sequence."""
    if config.seq_aux:
        return sharding.psum(x_BTX.sum(1), "sequence")
    return sharding.psum(x_BTX.sum((0, 1))[None], "batch", "sequence")


def updated_bias(
    bias_LE: Float[Array, "L E"], load_LE: Int[Array, "L E"], speed: Float[Array, ""] | float
) -> Float[Array, "L E"]:
    """Auxiliary-loss-free balancing: b += gamma * sign(mean load - load) (V3 section 2.1.2).

    ``load_LE`` must be the whole step's, over all data shards and micro-batches.
    """
    load = load_LE.astype(jnp.float32)
    return bias_LE + speed * jnp.sign(load.mean(-1, keepdims=True) - load)


class MoE(ParamModule):
    """Routed experts plus shared experts (V3 Eq. 12). Dropless: every choice is computed."""

    parallel: ExpertParallel = ExpertParallel()

    @nn.compact
    def __call__(self) -> Callable[..., tuple[list[jax.Array], Routing]]:
        """The layer as a function of ``bias_E``, parts of the batch, and their experts if chosen.

        It returns the output of every part, and the routing of all together.
        """
        c = self.config
        D, F, E, K = (
            c.hidden_size,
            c.moe_intermediate_size,
            c.n_routed_experts,
            c.num_experts_per_tok,
        )
        # V3 section 3.3.1 and Hugging Face: the gate is computed in float32 throughout. By default
        # a GPU would round its operands to TF32 and a TPU to bfloat16.
        gated = functools.partial(jnp.einsum, "btd,de->bte", precision=jax.lax.Precision.HIGHEST)
        gate_DE = self.weight("gate", (D, E), ("embed", None), jnp.float32)
        weights = ExpertWeights(
            self.weight("w1", (E, D, F), ("expert", "embed", "expert_mlp")),
            self.weight("w3", (E, D, F), ("expert", "embed", "expert_mlp")),
            self.weight("w2", (E, F, D), ("expert", "expert_mlp_in", None)),
        )
        shared = None
        if c.n_shared_experts:
            width = c.n_shared_experts * F
            shared = FeedForward(c, self.precision, width=width, name="shared_experts")()

        def moe(
            bias_E: Float[Array, "E"],
            x_BTD: Sequence[Float[Array, "B T D"]],
            experts_BTK: Sequence[Int[Array, "B T K"] | None],
        ) -> tuple[list[Float[Array, "B T D"]], Routing]:
            routing = [
                route(gated(x.astype(jnp.float32), gate_DE), bias_E, c, chosen)
                for x, chosen in zip(x_BTD, experts_BTK, strict=True)
            ]
            routing = jax.tree.map(lambda a: checkpoint_name(a, "router"), routing)
            chosen = [
                Chosen(x.reshape(-1, D), r.experts_BTK.reshape(-1, K), r.weights_BTK.reshape(-1, K))
                for x, r in zip(x_BTD, routing, strict=True)
            ]
            groups = (c.n_group, c.topk_group)
            outs = routed_experts(chosen, weights, self.precision, self.parallel, groups)
            outs = [out.reshape(x.shape) for out, x in zip(outs, x_BTD, strict=True)]
            if shared is not None:
                outs = [out + shared(x) for out, x in zip(outs, x_BTD, strict=True)]
            return outs, jax.tree.map(lambda *each: jnp.concatenate(each), *routing)

        return moe
