"""One training step for every stage: accumulate, update, balance; and the state it works on."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float, Int, PRNGKeyArray

from deepseek_jax import sharding
from deepseek_jax.model.moe import updated_bias
from deepseek_jax.model.transformer import (
    DeepSeekV3,
    init_params,
    init_router_bias,
    logical_axes,
)
from deepseek_jax.train.losses import LossParts, Totals
from deepseek_jax.train.optim import Schedule
from deepseek_jax.types import Array, Batch, Params, TrainState

Metrics = dict[str, Any]
# (params, router bias, micro-batch, totals of the step, step) -> (share of the loss, parts)
LossFn = Callable[[Params, jax.Array, Batch, Totals, jax.Array], tuple[Float[Array, ""], LossParts]]
TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


def make_train_step(
    tx: optax.GradientTransformation, loss_fn: LossFn, bias_speed: Schedule
) -> TrainStep:
    """``step(state, batch_ABT, max_loss) -> (state, metrics)``, pure; jit it with donation.

    The leading axis of the batch is gradient accumulation. A step whose loss or gradient is
    not finite, or whose loss exceeds ``max_loss``, leaves the state as it was and says
    ``skipped`` = 1.
    """

    def gradients(state: TrainState, batch: Batch) -> tuple[Params, LossParts]:
        totals = Totals(batch.loss_weights_BT.sum(), jnp.int32(batch.loss_weights_BT.shape[0]))
        grad_fn = jax.grad(loss_fn, has_aux=True)

        def micro(micro_batch: Batch) -> tuple[Params, LossParts]:
            return grad_fn(state.params, state.router_bias_LE, micro_batch, totals, state.step)

        if batch.tokens_BT.shape[0] == 1:
            return micro(Batch(*(x[0] for x in batch)))

        def body(total, micro_batch):
            return jax.tree.map(jnp.add, total, micro(micro_batch)), None

        first = jax.eval_shape(lambda b: micro(Batch(*(x[0] for x in b))), batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        return jax.lax.scan(body, zeros, batch)[0]

    def step(state: TrainState, batch: Batch, max_loss: Any) -> tuple[TrainState, Metrics]:
        grads, parts = gradients(state, batch)
        norm = optax.tree.norm(grads)
        loss = parts.metrics["loss"]
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= max_loss)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        # V3 section 2.1.2: the sign step follows the whole step's load. Under jit the counts
        # are global values, so every device computes the same bias.
        bias_LE = updated_bias(state.router_bias_LE, parts.load_LE, bias_speed(state.step))
        params: Any = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, opt_state, bias_LE)
        state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        violation_L = load_violation(parts.load_LE)
        return state, {
            **parts.metrics,
            "grad_norm": norm,
            "load_violation_max": violation_L.max(initial=0.0),
            "load_violation_mean": violation_L.mean() if violation_L.size else jnp.float32(0),
            "skipped": 1 - good.astype(jnp.int32),
            "load_LE": parts.load_LE,
        }

    return step


def load_violation(load_LE: Int[Array, "L E"]) -> Float[Array, "L"]:
    """MaxVio per layer: max load / mean load - 1; 0 is perfect balance (Wang et al., 2024)."""
    load = jnp.asarray(load_LE, jnp.float32)
    return load.max(-1) / jnp.maximum(load.mean(-1), 1e-9) - 1


# --- state -----------------------------------------------------------------------------------


def init_state(
    model: DeepSeekV3, tx: optax.GradientTransformation, key: PRNGKeyArray
) -> TrainState:
    """A fresh state: random parameters, empty optimizer, zero biases."""
    params = init_params(model, key)
    return TrainState(jnp.int32(0), params, tx.init(params), init_router_bias(model.config))


def state_shardings(model: DeepSeekV3, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where each leaf lives: optimizer moments with their parameters, the rest everywhere."""
    params = sharding.param_shardings(mesh, logical_axes(model))
    replicated = sharding.sharding(mesh)
    abstract = jax.eval_shape(functools.partial(init_state, model, tx), jax.random.key(0))
    opt_state = optax.tree_utils.tree_map_params(
        tx.init,
        lambda _, where: where,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, opt_state, replicated)


def abstract_state(model: DeepSeekV3, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    shapes = jax.eval_shape(functools.partial(init_state, model, tx), jax.random.key(0))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        state_shardings(model, tx, mesh),
    )


def place_batch(batches: list[Batch], mesh: Mesh) -> Batch:
    """This process's micro-batches as one global ``[A, B, T]`` batch on the mesh."""
    where = sharding.sharding(mesh, "accumulate", "batch", "sequence")
    return Batch(
        *(
            jax.make_array_from_process_local_data(where, np.stack(x))
            for x in zip(*batches, strict=True)
        )
    )
