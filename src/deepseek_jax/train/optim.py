"""AdamW as in the V3 report (section 4.2), and everything that varies with the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import Dtype
from deepseek_jax.types import Params, UserError

Schedule = Callable[[Any], Any]  # of the number of updates applied, a number or traced


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedules; the defaults are V3's, its 14.8T tokens being 1.

    Learning rate: linear warmup, constant, cosine to ``min_lr``, constant, ``final_lr``.
    """

    peak_lr: float = 2.2e-4
    min_lr: float = 2.2e-5
    final_lr: float = 7.3e-6
    warmup_steps: int | None = None
    """None: V3's 2000, or a twentieth of a shorter run."""
    constant_until: float = 10 / 14.8
    """Fraction of the run's tokens at which the cosine begins."""
    cosine_until: float = 14.3 / 14.8
    """Fraction of the tokens at which ``min_lr`` is reached."""
    min_until: float = (14.3 + 0.333) / 14.8
    """Fraction of the tokens at which ``final_lr`` begins."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    moments: Dtype = "float32"
    """Storage of both moments; V3: bfloat16 (section 3.3.2)."""
    weight_decay: float = 0.1
    """On matrices only: RMSNorm gains are not decayed."""
    clip_norm: float = 1.0
    ema_decay: float | None = None
    """Keep a moving average of the parameters, in float32 (see ``ema_params``)."""
    mtp_weight: float = 0.3
    """Lambda of V3 Eq. 25 until ``constant_until``, ``mtp_weight_final`` after."""
    mtp_weight_final: float = 0.1
    bias_speed: float = 0.001
    """Gamma of the router bias until ``cosine_until``; 0 after (V3 section 4.2)."""

    def __post_init__(self) -> None:
        """Refuse schedules that run backwards, and numbers with which nothing is learnt."""
        if not 0 <= self.constant_until <= self.cosine_until <= self.min_until <= 1:
            raise UserError(
                "the schedule needs 0 <= constant_until <= cosine_until <= min_until <= 1, not "
                f"{self.constant_until:.4g}, {self.cosine_until:.4g}, {self.min_until:.4g}."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must lie between 0 and 1.")
        if (self.warmup_steps or 0) < 0:
            raise UserError("warmup_steps must not be negative.")
        for names, good, rule in _RANGES:
            for name in names:
                if not good(value := getattr(self, name)):
                    raise UserError(f"{name}={value} must be {rule}.")
        # One that the schedule never comes to may be anything.
        later = {"min_lr": self.constant_until, "final_lr": self.min_until}
        above = [
            name
            for name, until in later.items()
            if until < 1 and getattr(self, name) > self.peak_lr
        ]
        if above:
            raise UserError(
                f"the learning rate would rise from peak_lr={self.peak_lr} to "
                f"{' and '.join(f'{name}={getattr(self, name)}' for name in above)}; lower "
                f"{' and '.join(above)} to at most peak_lr, or raise peak_lr."
            )


# Comparisons that NaN fails.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("peak_lr", "eps"), lambda x: 0 < x < math.inf, "a positive number"),
    (("clip_norm",), lambda x: x > 0, "a positive number; inf: no clipping"),
    (("b1", "b2"), lambda x: 0 <= x < 1, "at least 0 and less than 1"),
    (
        ("min_lr", "final_lr", "weight_decay", "mtp_weight", "mtp_weight_final", "bias_speed"),
        lambda x: 0 <= x < math.inf,
        "0 or a positive number",
    ),
)


def constant_rate(rate: float) -> OptimConfig:
    """One rate throughout, router biases as they were left: R1's for what starts from a policy.

    Its decay is not published: none.
    """
    return OptimConfig(
        peak_lr=rate,
        min_lr=rate,
        final_lr=rate,
        warmup_steps=0,
        constant_until=1.0,
        cosine_until=1.0,
        min_until=1.0,
        weight_decay=0.0,
        bias_speed=0.0,
    )


def learning_rate(config: OptimConfig, steps: int) -> Schedule:
    """V3's schedule stretched over ``steps``, all of which are taken to see as many tokens.

    Where they do not, the config is to be `LoopConfig.in_steps`.

    Raises:
        UserError: if the warmup does not fit before the cosine.
    """
    constant, cosine, end = (
        round(steps * fraction)
        for fraction in (config.constant_until, config.cosine_until, config.min_until)
    )
    warmup = min(2000, steps // 20) if config.warmup_steps is None else config.warmup_steps
    if warmup > constant:
        raise UserError(
            f"warmup_steps={warmup} runs past step {constant}, where the cosine "
            f"begins in a run of {steps}; lower warmup_steps or raise constant_until."
        )
    return optax.join_schedules(
        [
            # Step 0 already learns: a learning rate of 0 would waste a batch.
            optax.linear_schedule(config.peak_lr / (warmup + 1), config.peak_lr, warmup),
            optax.constant_schedule(config.peak_lr),
            optax.cosine_decay_schedule(
                config.peak_lr, max(cosine - constant, 1), config.min_lr / config.peak_lr
            ),
            optax.constant_schedule(config.min_lr),
            optax.constant_schedule(config.final_lr),
        ],
        [warmup, constant, cosine, end],
    )


def mtp_weight(config: OptimConfig, steps: int) -> Schedule:
    """Lambda: 0.3 for the first 10T tokens, then 0.1."""
    change = round(steps * config.constant_until)
    return lambda step: jnp.where(step < change, config.mtp_weight, config.mtp_weight_final)


def bias_speed(config: OptimConfig, steps: int) -> Schedule:
    """Gamma: 0.001 for the first 14.3T tokens, then 0."""
    change = round(steps * config.cosine_until)
    return lambda step: jnp.where(step < change, config.bias_speed, 0.0)


def batch_ramp_stairs(first: int, last: int, multiple: int) -> int:
    """Sizes that a ramp goes through before it has reached ``last``."""
    return min(8, max(1, (last - first) // multiple))


def batch_ramp(first: int, last: int, ramp_steps: int, multiple: int) -> Callable[[int], int]:
    """Sequences per step: from ``first`` to ``last`` in at most eight equal stairs.

    V3 went from 3072 to 15,360 over its first 469B tokens without giving the shape; stairs,
    because every distinct size is compiled once. All sizes are multiples of ``multiple``.
    """
    stairs = batch_ramp_stairs(first, last, multiple)

    def size(step: int) -> int:
        if step >= ramp_steps:
            return last
        stair = step * stairs // ramp_steps
        grown = first + (last - first) * stair / stairs
        return math.floor(grown / multiple) * multiple

    return size


def decays(params: Params) -> Any:
    """True for the leaves that weight decay applies to: all but RMSNorm gains.

    By name and not by rank: stacked over layers, a gain is two-dimensional too.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith("norm"), params
    )


class ParamsEma(NamedTuple):
    """State of ``params_ema``."""

    ema: Params


def params_ema(decay: float) -> optax.GradientTransformation:
    """Pass updates through and average the parameters they lead to; last in a chain.

    Starts at the initial parameters; V3 keeps such an average without stating its decay. In
    float32 whatever the parameters are: a step is too small for bfloat16 to hold.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ParamsEma]:
        after = optax.tree.cast(optax.apply_updates(params, updates), jnp.float32)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, after)
        return updates, ParamsEma(ema)

    def init(params: Any) -> ParamsEma:
        # A copy: the state is donated to the step beside the parameters.
        return ParamsEma(jax.tree.map(lambda p: jnp.array(p, jnp.float32), params))

    return optax.GradientTransformation(init, update)


def ema_params(opt_state: Any) -> Params:
    """The averaged parameters inside an optimizer state.

    Raises:
        UserError: if the run keeps none.
    """
    is_ema = lambda x: isinstance(x, ParamsEma)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_ema) if is_ema(x)]
    if not found:
        raise UserError("this run keeps no average of its parameters; set ema_decay.")
    return found[0].ema


class Reference(NamedTuple):
    """State of ``keep_reference``."""

    reference: Params


def keep_reference() -> optax.GradientTransformation:
    """Pass updates through and hold a copy of the parameters as they were at the start.

    So the reference policy lies where the parameters lie and is in every checkpoint; without a KL
    term there is none.
    """

    def init(params: Any) -> Reference:
        # A copy: the state is donated to the step beside the parameters.
        return Reference(jax.tree.map(jnp.copy, params))

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def reference_params(opt_state: Any) -> Params:
    """The reference policy inside an optimizer state that has one."""
    is_reference = lambda x: isinstance(x, Reference)  # noqa: E731
    leaves = jax.tree.leaves(opt_state, is_leaf=is_reference)
    (found,) = (x for x in leaves if is_reference(x))
    return found.reference


def refreshed_reference(opt_state: Any, params: Params) -> Any:
    """The same with ``params`` as the reference from now on."""
    is_reference = lambda x: isinstance(x, Reference)  # noqa: E731
    new = Reference(jax.tree.map(jnp.copy, params))
    return jax.tree.map(lambda x: new if is_reference(x) else x, opt_state, is_leaf=is_reference)


def scale_by_adam(config: OptimConfig) -> optax.GradientTransformation:
    """Adam that computes in float32 whatever it stores its moments in (V3 section 3.3.2)."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def cast(state: Any, dtype: Any) -> Any:
        mu, nu = (optax.tree.cast(tree, dtype) for tree in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, config.moments)

    return optax.GradientTransformation(
        lambda params: cast(adam.init(params), config.moments), update
    )


def clip(config: OptimConfig) -> optax.GradientTransformation:
    """Clip by the norm of all gradients; from here on they are float32.

    Gradients of bfloat16 parameters are bfloat16: so would their norm be, and the moments.
    """
    inner = optax.clip_by_global_norm(config.clip_norm)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(optax.tree.cast(updates, jnp.float32), state, params)

    return optax.GradientTransformation(inner.init, update)


def make_optimizer(
    config: OptimConfig, steps: int, still: Callable[[Params], Any] | None = None
) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, schedule, and the optional average.

    ``still(params)`` is True for the leaves that are not to change.
    """
    parts = [
        clip(config),
        scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    ]
    if still is not None:
        parts.append(optax.masked(optax.set_to_zero(), still))
    if config.ema_decay is not None:
        parts.append(params_ema(config.ema_decay))
    return optax.chain(*parts)
