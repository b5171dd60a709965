"""One training step for every stage: accumulate, update, balance; and the state it works on."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int, PRNGKeyArray

from deepseek_jax import sharding
from deepseek_jax.model.moe import updated_bias
from deepseek_jax.model.transformer import (
    DeepSeekV3,
    init_params,
    init_router_bias,
    logical_axes,
    sharded_params,
)
from deepseek_jax.train.losses import LossParts, Totals
from deepseek_jax.train.optim import Schedule
from deepseek_jax.types import Array, Batch, Params, TrainState

Metrics = dict[str, Any]
BATCH_SPEC = sharding.spec("accumulate", "batch", "sequence")
# (params, router bias, micro-batch, totals of the step, step, **frozen) -> (share of the loss,
# parts); ``frozen`` are trees of parameters by name that the loss reads and nothing updates. The
# micro-batch is a ``Batch`` or, in reinforcement learning, a ``Rollout``.
LossFn = Callable[..., tuple[Float[Array, ""], LossParts]]
# (state, batch, max_loss, frozen) -> (state, metrics); ``frozen`` may be left out.
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    model: DeepSeekV3,
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    bias_speed: Schedule,
    *,
    axes: Params | None = None,
    frozen_axes: Params | None = None,
    totals_of: Callable[[Any], Any] | None = None,
) -> TrainStep:
    """``step(state, batch_ABT, max_loss, frozen={}) -> (state, metrics)``; jit it with donation.

    The batch is any tree of arrays that begin with the axes A, B, T (as far as they have any), and
    ``totals_of(batch)`` what the shares of its micro-batches are divided by: default, the
    ``losses.Totals`` of a ``Batch``.

    ``axes`` are the logical axes of ``state.params`` where these are not the model's own, and
    ``frozen_axes`` those of each tree in ``frozen``.

    The leading axis of the batch is gradient accumulation. A step whose loss or gradient is
    not finite, or whose loss exceeds ``max_loss``, leaves the state as it was and says
    ``skipped`` = 1.

    Under ``jax.set_mesh`` loss and gradients are computed per device (``sharding.per_device``):
    ``loss_fn`` sees the device's own rows and must return the whole mesh's figures, as those of
    ``train.losses`` do. Gradients are summed over replicas once per step, not per micro-batch.
    """

    def gradients(
        specs: Params,
        params: Params,
        bias_LE: jax.Array,
        batch: Any,
        step: jax.Array,
        frozen: Params,
    ) -> tuple[Params, LossParts]:
        totals = (totals_of or batch_totals)(batch)

        def micro(micro_batch: Any) -> tuple[Params, LossParts]:
            loss, pullback, parts = jax.vjp(
                lambda p: loss_fn(p, bias_LE, micro_batch, totals, step, **frozen),
                params,
                has_aux=True,
            )
            # Every device returns the same loss; each starts from its share of the cotangent.
            return pullback(jnp.full_like(loss, 1 / sharding.replicas()))[0], parts

        if len(jax.tree.leaves(batch)[0]) == 1:
            grads, parts = micro(jax.tree.map(lambda x: x[0], batch))
            return sharding.sum_gradients(grads, specs), parts

        def body(total, micro_batch):
            return jax.tree.map(jnp.add, total, micro(micro_batch)), None

        first = jax.eval_shape(lambda b: micro(jax.tree.map(lambda x: x[0], b)), batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        grads, parts = jax.lax.scan(body, zeros, batch)[0]
        return sharding.sum_gradients(grads, specs), parts

    def step(
        state: TrainState, batch: Any, max_loss: Any, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        mesh, everywhere = jax.sharding.get_abstract_mesh(), sharding.spec()
        own = logical_axes(model) if axes is None else axes
        specs = sharding.param_specs(mesh, own, state.params)
        frozen_specs = sharding.param_specs(mesh, frozen_axes or {}, frozen or {})
        grads, parts = sharding.per_device(
            functools.partial(gradients, specs),
            in_specs=(specs, everywhere, batch_specs(batch), everywhere, frozen_specs),
            out_specs=(specs, everywhere),
        )(state.params, state.router_bias_LE, batch, state.step, frozen or {})
        with jax.named_scope("optimizer"):
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


def batch_specs(batch: Any) -> Any:
    """Where each array of a batch lies: all begin with the axes A, B, T, as far as they go."""
    return jax.tree.map(lambda x: PartitionSpec(*BATCH_SPEC[: x.ndim]), batch)


def batch_totals(batch: Batch) -> Totals:
    """Of the whole step. Per device: ``batch`` is its own part."""
    weight = sharding.psum(batch.loss_weights_BT.sum(), "batch", "sequence")
    return Totals(weight, jnp.int32(batch.loss_weights_BT.shape[0]))


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


def abstract_state(
    model: DeepSeekV3,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    params: Params | None = None,
) -> TrainState:
    """Shapes, dtypes and places of the state: what a checkpoint is restored into.

    Optimizer moments lie with their parameters, the rest everywhere. ``params`` are those trained,
    abstract, where they are not the model's own.

    Raises:
        UserError: if an axis of the mesh does not divide the dimension it must divide.
    """
    everywhere = sharding.sharding(mesh)
    if params is None:
        params = sharded_params(model, mesh)
    shapes = jax.eval_shape(
        lambda p: TrainState(jnp.int32(0), p, tx.init(p), init_router_bias(model.config)), params
    )
    opt_state = optax.tree_utils.tree_map_params(
        tx.init,
        lambda _, param: param.sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    where = TrainState(
        everywhere, jax.tree.map(lambda x: x.sharding, params), opt_state, everywhere
    )
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, where
    )


def state_shardings(model: DeepSeekV3, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where each leaf of ``abstract_state`` lives."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh))
