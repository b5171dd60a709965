"""The containers every stage shares, and the legend of axis letters.

Arrays carry their axes as a suffix (``x_BTD``). One letter, one meaning, everywhere:

====== =================================================================
letter axis
====== =================================================================
A      accumulation: micro-batches of one optimizer step
B      batch: sequences (rows)
T      time: query positions of a row
S      source: key positions of a row, or slots of the cache
D      model width (``hidden_size``)
F      feed-forward width (``intermediate_size`` or ``moe_intermediate_size``)
V      vocabulary
L      layers; in ``router_bias_LE``: the MoE layers, then the MTP modules
N      attention heads
H      width of a query/key head (``qk_nope_head_dim + qk_rope_head_dim``)
C      the un-rotated ("nope") part of H, ``qk_nope_head_dim``
P      the rotated part of H, ``qk_rope_head_dim``
O      width of a value head, ``v_head_dim``
Q      latent width of queries, ``q_lora_rank``
R      latent width of keys and values, ``kv_lora_rank``
E      routed experts
K      experts per token (top-k); in ``pallas_kernels`` the contracted axis
G      groups: of experts, of a grouped matmul's rows, of values that share an FP8 scale
M      rows: flattened (token, chosen expert) pairs; flattened positions in losses
====== =================================================================
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

# The containers hold NumPy arrays on the host and JAX arrays on devices. Which of the two is
# known where they are used, but not to a static checker; at run time both are checked for.
if TYPE_CHECKING:
    Array = Any
else:
    Array = jax.Array | np.ndarray
Params = dict[str, Any]


class UserError(Exception):
    """Bad input from outside (data, config, checkpoint, mesh): one sentence, with the remedy.

    The command line prints the message alone and exits with status 2. Not a ``ValueError``:
    libraries that call back into ours (tyro building a dataclass) would dress it up as theirs.
    """


class Batch(NamedTuple):
    """One (micro-)batch of packed rows, the same for every stage of training.

    A row holds one or more documents ("segments") end to end. ``targets`` is ``tokens`` one
    step ahead; ``loss_weights`` is 1 where the target is to be learned and 0 elsewhere;
    ``positions`` restarts at 0 in every segment; ``segment_ids`` counts 1, 2, ... within the
    row and is 0 on padding.
    """

    tokens_BT: Int[Array, "*A B T"]
    targets_BT: Int[Array, "*A B T"]
    loss_weights_BT: Float[Array, "*A B T"]
    positions_BT: Int[Array, "*A B T"]
    segment_ids_BT: Int[Array, "*A B T"]


class Rollout(NamedTuple):
    """Completions to learn from by policy gradient, one a row, prompt and all.

    ``batch.loss_weights_BT`` is 1 where the target is a token of the completion; the
    log-probabilities at index t are those of ``targets_BT[:, t]``.
    """

    batch: Batch
    advantages_B: Float[Array, "*A B"]
    old_logp_BT: Float[Array, "*A B T"] | None = None
    """By the policy that the rollout began with. None: by the one being updated (one update
    per rollout), which makes every ratio exactly 1."""
    ref_logp_BT: Float[Array, "*A B T"] | None = None
    """By the reference policy; None where there is no KL term."""
    sampler_logp_BT: Float[Array, "*A B T"] | None = None
    """As the sampler computed them while sampling, its rounding included."""
    kept_BTX: Int[Array, "*A B T X"] | None = None
    """Ids that top-k or top-p left to the sampler, padded with -1; a row of -1: all."""
    experts_BTLK: Int[Array, "*A B T l K"] | None = None
    """Which experts each MoE layer chose while sampling; -1 as a token's first: none was kept."""


class KVCache(NamedTuple):
    """The latent cache of MLA (V2 section 2.1): R + P values per token and layer, none per head.

    ``k_pe`` is stored after its rotation; ``length`` counts the tokens held per row.
    """

    c_kv_LBSR: Float[Array, "L B S R"]
    k_pe_LBSP: Float[Array, "L B S P"]
    length_B: Int[Array, "B"]
    scale_LBSG: Float[Array, "L B S G"] | None = None
    """Where ``c_kv`` is in FP8: the scales of its 1x128 tiles."""


class TrainState(NamedTuple):
    """All that a training step reads and writes.

    ``router_bias`` is state, not a parameter: neither the optimizer, nor weight decay, nor
    gradient clipping sees it (V3 section 2.1.2).
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    router_bias_LE: Float[Array, "L E"]
