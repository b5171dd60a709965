"""Communication of the expert axis on paper (docs/scaling.md derives it).

A token goes once to every device that holds any of its experts, and one row comes back from
each. How many devices that is depends on the routing; here under uniform group-limited routing:
``topk_group`` of the ``n_group`` groups at random, then K experts of theirs at random.
"""

import math
from typing import NamedTuple

from deepseek_jax.config import ModelConfig, RematPolicy
from deepseek_jax.model import dispatch

# An E4M3 row of D channels carries one float32 scale per 128 of them (V3 section 3.3.2).
_FP8_TILE = 128


class RowBytes(NamedTuple):
    """What a token's hidden state weighs on the way."""

    bf16: float
    fp8: float


def row_bytes(config: ModelConfig) -> RowBytes:
    """Of one token: D values, in FP8 with their scales."""
    D = config.hidden_size
    return RowBytes(2.0 * D, D + 4.0 * math.ceil(D / _FP8_TILE))


def expected_receivers(config: ModelConfig, devices: int) -> float:
    """Distinct devices that hold a token's K experts, the sender itself included.

    With h of the P = g E/G reachable experts on a device of which all are reachable, none of the
    K chosen is there with probability C(P - h, K) / C(P, K). A device's reachable experts depend
    on which of the groups that it overlaps are kept, a hypergeometric draw.
    """
    E, G, g, K = (
        config.n_routed_experts,
        config.n_group,
        config.topk_group,
        config.num_experts_per_tok,
    )
    reachable, here = g * E // G, E // devices
    expected = 0.0
    for device in range(devices):
        overlaps = _overlaps(device * here, here, E // G)
        for kept in range(2 ** len(overlaps)):
            chosen = [n for i, n in enumerate(overlaps) if kept >> i & 1]
            if len(chosen) > g:
                continue
            ways = math.comb(G - len(overlaps), g - len(chosen))
            none = math.comb(reachable - sum(chosen), K) / math.comb(reachable, K)
            expected += ways / math.comb(G, g) * (1 - none)
    return expected


def _overlaps(first: int, count: int, group: int) -> list[int]:
    """How many of ``count`` experts from ``first`` on lie in each group that they touch."""
    touched = range(first // group, (first + count - 1) // group + 1)
    return [min(first + count, (i + 1) * group) - max(first, i * group) for i in touched]


def most_receivers(config: ModelConfig, devices: int) -> int:
    """The most devices that a token can go to: K experts, in ``topk_group`` groups."""
    return dispatch.most_receivers(
        config.num_experts_per_tok, devices, config.n_group, config.topk_group
    )


class TokenTraffic(NamedTuple):
    """Bytes a device sends for each of its tokens, in one MoE layer's forward pass."""

    dispatch_bf16: float
    dispatch_fp8: float
    combine_bf16: float

    @property
    def bf16(self) -> float:
        """There and back in BF16."""
        return self.dispatch_bf16 + self.combine_bf16

    @property
    def fp8(self) -> float:
        """There in FP8, back in BF16, as V3 does."""
        return self.dispatch_fp8 + self.combine_bf16


def token_traffic(
    config: ModelConfig, devices: int, receivers: float | None = None
) -> TokenTraffic:
    """Of ``receivers`` (default: the expected ones), one of N is the sender itself: no traffic."""
    if receivers is None:
        receivers = expected_receivers(config, devices)
    remote, row = receivers * (devices - 1) / devices, row_bytes(config)
    return TokenTraffic(remote * row.bf16, remote * row.fp8, remote * row.bf16)


# Gates and ids of a row travel in one message of a tile's width, 128 lanes of 4 bytes.
_CHOICES_BYTES = 512


def step_traffic(config: ModelConfig, devices: int, remat: RematPolicy = "full") -> float:
    """Bytes a device sends over the expert axis for each token of a training step, BF16.

    Per MoE layer, MTP's included: there and back forward, there and back for the gradients, and
    there once more where the backward pass computes again. Gates and ids go with the tokens, and
    the gates' gradients come back.
    """
    if devices == 1:
        return 0.0
    there = token_traffic(config, devices).dispatch_bf16
    choices = there / row_bytes(config).bf16 * _CHOICES_BYTES
    again = 0 if remat == "none" else 1
    return config.num_routers * ((4 + again) * there + (2 + again) * choices)


def ring_traffic(config: ModelConfig, devices: int) -> float:
    """Bytes a device sends for each of its tokens when all tokens go round a ring of devices.

    Each of N hops carries the hidden state (2 D), the float32 sum that comes home (4 D), and the
    ids and gates of K experts (8 K).
    """
    D, K = config.hidden_size, config.num_experts_per_tok
    return devices * (2.0 * D + 4.0 * D + 8.0 * K) if devices > 1 else 0.0
