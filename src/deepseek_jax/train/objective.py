"""GRPO and its variants: advantages, clipped surrogate, KL terms, corrections for the sampler.

Per token t of completion i, with A_i its advantage and rho the ratio of the policy to the one
that the rollout began with:

    L_it = -M_it c_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i) + beta KL_it

(R1 Eqs. 1-3; V3.2 section 3.1). A variant is a function that says what rho is and what each
token's loss is weighted with; the weights divide by totals of the whole optimizer step, so the
shares of its micro-batches add up to one mean, whatever the split. M is V3.2's off-policy
sequence mask and c the truncated importance weight; both are 1 unless asked for.

On the first update of a rollout every rho is 1, so this loss is minus the (weighted) mean
advantage: 0 wherever the advantages of each group sum to 0. Its gradient is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Bool, Float

from deepseek_jax import sharding
from deepseek_jax.types import Array, Rollout, UserError

Scale = Literal["group", "batch", "none"]

# A ratio past e^20 is clipped or lost anyway; without a bound its overflow times zero is NaN.
_LOG_RATIO_BOUND = 20.0


# --- advantages ------------------------------------------------------------------------------


def group_advantages(rewards_PG: Float[Array, "P G"], scale: Scale) -> Float[Array, "P G"]:
    """How much better each of a prompt's G completions is than their mean (R1 Eq. 3).

    Args:
        rewards_PG: of G completions for each of P prompts.
        scale: divide by the standard deviation (of the population, without Bessel's correction)
            of the group's rewards, of the whole batch's, or by nothing (Dr. GRPO, V3.2).

    Equal rewards give exactly 0, whatever their mean rounds to.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdims=True)
    if scale == "group":
        centred_PG = centred_PG / (rewards_PG.std(1, keepdims=True) + 1e-6)
    elif scale == "batch":
        centred_PG = centred_PG / (rewards_PG.std() + 1e-6)
    return jnp.where(has_spread(rewards_PG)[:, None], centred_PG, 0.0)


def has_spread(rewards_PG: Float[Array, "P G"]) -> Bool[Array, "P"]:
    """Whether a group's rewards differ; DAPO samples again the groups where they do not."""
    return rewards_PG.max(1) > rewards_PG.min(1)


def without_truncated(
    mask_BT: Float[Array, "B T"], truncated_B: Bool[Array, "B"]
) -> Float[Array, "B T"]:
    """The mask without completions cut off at the length limit (DAPO's overlong filtering)."""
    return jnp.where(truncated_B[:, None], 0.0, mask_BT)


# --- KL to the reference, per token -----------------------------------------------------------


def kl_k1(log_ratio_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """log(pi / ref): unbiased as a figure, useless as a loss.

    Its gradient is that of log pi, whose expectation under pi is 0: it restrains nothing.
    """
    return -log_ratio_BT


def kl_k2(log_ratio_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Half the squared log-ratio: biased as a figure; on-policy its gradient is the KL's."""
    return jnp.square(log_ratio_BT) / 2


def kl_k3(log_ratio_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """ref/pi - log(ref/pi) - 1 (R1 Eq. 2): unbiased as a figure, never negative.

    Args:
        log_ratio_BT: log(ref / pi) of the sampled tokens.
    """
    return jnp.expm1(log_ratio_BT) - log_ratio_BT


def kl_unbiased(
    log_ratio_BT: Float[Array, "B T"], policy_ratio_BT: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """k3 times pi / pi_old (V3.2 section 3.1): its gradient is the KL's, off-policy too."""
    return policy_ratio_BT * kl_k3(log_ratio_BT)


# --- variants ---------------------------------------------------------------------------------


class StepTotals(NamedTuple):
    """Of a whole optimizer step: all micro-batches, all shards."""

    tokens: Float[Array, ""]
    sequences: Float[Array, ""]
    """Completions with at least one token that counts."""


def step_totals(mask_ABT: Float[Array, "*A B T"]) -> StepTotals:
    """Counts over the mesh. Per device: ``mask_ABT`` is its own part."""
    counts_AB = sharding.psum((mask_ABT > 0).sum(-1), "sequence")
    tokens, sequences = sharding.psum((counts_AB.sum(), (counts_AB > 0).sum()), "batch")
    return StepTotals(tokens.astype(jnp.float32), sequences.astype(jnp.float32))


class Weighted(NamedTuple):
    """What a variant decides."""

    log_ratio_BT: Float[Array, "B T"]
    weights_BT: Float[Array, "B T"]
    """Of each token's loss; 0 outside completions."""


def grpo(
    log_ratio_BT: Float[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    totals: StepTotals,
    max_tokens: int,
) -> Weighted:
    """Mean over each completion's tokens, then over completions (DeepSeekMath Eq. 3; R1 Eq. 1)."""
    weights_BT = mask_BT / jnp.maximum(_length(mask_BT), 1) / jnp.maximum(totals.sequences, 1)
    return Weighted(log_ratio_BT, weights_BT)


def dr_grpo(
    log_ratio_BT: Float[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    totals: StepTotals,
    max_tokens: int,
) -> Weighted:
    """Sum over tokens, by one constant length (Dr. GRPO, Liu et al. 2025, section 3.2).

    GRPO's division by the own length makes a long wrong answer cheaper than a short one.
    """
    return Weighted(log_ratio_BT, mask_BT / (max_tokens * jnp.maximum(totals.sequences, 1)))


def dapo(
    log_ratio_BT: Float[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    totals: StepTotals,
    max_tokens: int,
) -> Weighted:
    """Mean over all tokens of the step (DAPO, Yu et al. 2025, Eq. 12)."""
    return Weighted(log_ratio_BT, mask_BT / jnp.maximum(totals.tokens, 1))


def gspo(
    log_ratio_BT: Float[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    totals: StepTotals,
    max_tokens: int,
) -> Weighted:
    """One ratio per completion, its tokens' geometric mean (GSPO, Zheng et al. 2025, Eqs. 5-7)."""
    weighted = grpo(log_ratio_BT, mask_BT, totals, max_tokens)
    mean_B1 = _mean(log_ratio_BT, mask_BT)
    return Weighted(jnp.broadcast_to(mean_B1, mask_BT.shape), weighted.weights_BT)


class Variant(NamedTuple):
    """A variant and the constants that its paper gives."""

    form: Callable[..., Weighted]
    clip_low: float
    clip_high: float
    scale: Scale
    kl_coef: float


VARIANTS = {
    # R1 section B.2; the clip is TRL's, R1-Zero's is not published and R1's is 10.
    "grpo": Variant(grpo, 0.2, 0.2, "group", 0.001),
    "dr_grpo": Variant(dr_grpo, 0.2, 0.2, "none", 0.0),
    "dapo": Variant(dapo, 0.2, 0.28, "group", 0.0),
    "gspo": Variant(gspo, 3e-4, 4e-4, "group", 0.0),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """A variant of GRPO; what is None is as the variant's paper has it."""

    variant: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    clip_low: float | None = None
    """The ratio is clipped to 1 - clip_low from below. 1 or more: not at all."""
    clip_high: float | None = None
    scale: Scale | None = None
    """What advantages are divided by: the standard deviation of the group, the batch; nothing."""
    kl_coef: float | None = None
    """beta. 0: no reference policy is needed."""
    kl: Literal["k2", "k3", "unbiased"] = "k3"
    """Estimator of the KL term. k1 has no expected gradient, so it is not among them."""
    importance_cap: float | None = None
    """Weigh tokens by min(trainer's / sampler's probability, cap), both before the update."""
    off_policy_threshold: float | None = None
    """Drop the policy term of completions with A < 0 whose mean log(sampler / policy) exceeds
    this (V3.2's delta)."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.variant not in VARIANTS:
            raise UserError(f"no variant {self.variant!r}; there are {', '.join(VARIANTS)}.")
        if self.kl not in ("k2", "k3", "unbiased"):
            raise UserError(
                f"kl={self.kl!r} is not offered as a loss; take k3, unbiased or k2 (the expected "
                "gradient of k1 is 0)."
            )
        for name in ("clip_low", "clip_high", "kl_coef", "off_policy_threshold"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"{name}={value} must be at least 0.")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise UserError(f"importance_cap={self.importance_cap} must be positive.")

    def resolved(self) -> Variant:
        """The variant with what is set here instead of the paper's."""
        fields = {name: getattr(self, name) for name in Variant._fields if name != "form"}
        chosen = {name: value for name, value in fields.items() if value is not None}
        return VARIANTS[self.variant]._replace(**chosen)


# --- the loss ---------------------------------------------------------------------------------


def policy_loss(
    logp_BT: Float[Array, "B T"],
    rollout: Rollout,
    totals: StepTotals,
    config: ObjectiveConfig,
    max_tokens: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This micro-batch's share of the step's loss, and of its metrics.

    Args:
        logp_BT: by the policy being updated; the loss is differentiable in it alone.
        rollout: one micro-batch of it.
        totals: of the whole step (``step_totals``).
        config: the variant.
        max_tokens: most tokens a completion can have (Dr. GRPO divides by it).

    Raises:
        UserError: if the rollout lacks log-probabilities that ``config`` asks for.
    """
    form, low, high, _, kl_coef = config.resolved()
    mask_BT = (rollout.batch.loss_weights_BT > 0).astype(jnp.float32)
    advantages_B1 = rollout.advantages_B[:, None]
    current_BT = stop_gradient(logp_BT)
    old_BT = current_BT if rollout.old_logp_BT is None else rollout.old_logp_BT
    token_log_ratio_BT = _difference(logp_BT, old_BT, mask_BT)

    log_ratio_BT, weights_BT = form(token_log_ratio_BT, mask_BT, totals, max_tokens)
    ratio_BT = jnp.exp(log_ratio_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - low, 1 + high)
    loss_BT = -jnp.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)

    each_BT = mask_BT / jnp.maximum(totals.tokens, 1)
    metrics_BT = {
        "ratio": ratio_BT * each_BT,
        "clipped_low": ((ratio_BT < 1 - low) & (advantages_B1 < 0)) * each_BT,
        "clipped_high": ((ratio_BT > 1 + high) & (advantages_B1 > 0)) * each_BT,
        "advantage_size": jnp.abs(advantages_B1) * each_BT,
    }

    if rollout.sampler_logp_BT is not None:
        mismatch_BT = _difference(old_BT, rollout.sampler_logp_BT, mask_BT)
        metrics_BT["sampler_mismatch"] = jnp.abs(mismatch_BT) * each_BT
        metrics_BT["sampler_ratio"] = jnp.exp(mismatch_BT) * each_BT
    if config.importance_cap is not None:
        mismatch_BT = _difference(old_BT, _present(rollout.sampler_logp_BT, "sampler"), mask_BT)
        # At the level of the variant's ratio: per completion in GSPO.
        mismatch_BT = form(mismatch_BT, mask_BT, totals, max_tokens).log_ratio_BT
        weight_BT = jnp.minimum(jnp.exp(mismatch_BT), config.importance_cap)
        loss_BT *= stop_gradient(weight_BT)
        metrics_BT["importance_weight"] = weight_BT * each_BT
    if config.off_policy_threshold is not None:
        sampler_BT = _present(rollout.sampler_logp_BT, "sampler")
        drift_B1 = _mean(_difference(sampler_BT, current_BT, mask_BT), mask_BT)
        dropped_B1 = (advantages_B1 < 0) & (drift_B1 > config.off_policy_threshold)
        loss_BT *= ~dropped_B1
        metrics_BT["off_policy_dropped"] = dropped_B1 * each_BT

    metrics_BT["policy_loss"] = loss_BT * weights_BT
    if kl_coef:
        to_ref_BT = _difference(_present(rollout.ref_logp_BT, "reference"), logp_BT, mask_BT)
        if config.kl == "unbiased":
            kl_BT = kl_unbiased(to_ref_BT, jnp.exp(token_log_ratio_BT))
        else:
            kl_BT = {"k2": kl_k2, "k3": kl_k3}[config.kl](to_ref_BT)
        loss_BT += kl_coef * kl_BT
        metrics_BT["kl"] = kl_k3(to_ref_BT) * each_BT
    metrics_BT["loss"] = loss_BT * weights_BT
    sums = {name: value.sum() for name, value in metrics_BT.items()}
    sums = sharding.psum(sums, "batch", "sequence")
    return sums["loss"], sums


def _difference(a_BT: jax.Array, b_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Of log-probabilities; 0 outside completions, where they mean nothing."""
    difference_BT = jnp.where(mask_BT > 0, a_BT - b_BT, 0)
    return jnp.clip(difference_BT, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)


def _length(mask_BT: jax.Array) -> jax.Array:
    return sharding.psum(mask_BT.sum(-1, keepdims=True), "sequence")


def _mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Over each completion's tokens."""
    total_B1 = sharding.psum((x_BT * mask_BT).sum(-1, keepdims=True), "sequence")
    return total_B1 / jnp.maximum(_length(mask_BT), 1)


def _present(logp_BT: Array | None, whose: str) -> Array:
    if logp_BT is None:
        raise UserError(
            f"the objective compares with the {whose}'s log-probabilities, which the rollout does "
            "not hold; keep them, or set the option that asks for them to 0 or none."
        )
    return logp_BT
