"""Expert parallelism: tokens to the devices that hold their experts, and back. Dropless, exact.

Two dispatchers behind one signature. Both compute every choice whatever the skew, and both give
every token the same sum, to rounding.

*ragged* sends a token once to every device that holds any of its experts (V3 section 3.2.2; with
node-limited routing, to no more than ``topk_group`` devices where a device holds a group), in
messages of exact size (``ragged_all_to_all``), and gets one row back from each. Its receive
buffer has a fixed size; what does not fit takes another round, so memory is bounded without a
token being dropped.

*ring* passes every device's tokens round the expert axis. It sends more, but only to the
neighbour, while the tokens at hand are computed; and it runs everywhere.

Where products are in FP8, tokens are quantized before they leave and travel so, and in the backward
pass the gradients that go out to the experts likewise (V3 section 3.3.3). What comes back, outputs
and the gradients of the tokens, is BF16.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax import sharding
from deepseek_jax.config import Precision
from deepseek_jax.model.experts import (
    ExpertWeights,
    Fp8Rows,
    Outputs,
    Pairs,
    compact,
    fp8_gradient,
    fp8_rows,
    from_pairs,
    local_experts,
    sorted_pairs,
    to_pairs,
)
from deepseek_jax.types import UserError

Dispatcher = Literal["auto", "ragged", "ring"]


@dataclass(frozen=True)
class ExpertParallel:
    """How the expert axis of the mesh is used."""

    dispatcher: Dispatcher = "auto"
    """auto: ragged on TPU and GPU, ring on CPU, which has no ragged all-to-all."""
    receive_factor: float = 1.5
    """Size of ragged's receive buffer, in expert inputs per device under perfect balance."""
    overlap: bool = False
    """Compute each layer on two halves of a device's rows, so that one half's tokens travel
    while the other half is computed. Needs an even number of rows per device."""

    def __post_init__(self) -> None:
        """Refuse a buffer that perfect balance would not fit in."""
        if self.receive_factor < 1:
            raise UserError(f"receive_factor={self.receive_factor} must be at least 1.")

    def check_rows(self, rows: int) -> None:
        """Refuse a number of rows per device that ``overlap`` cannot halve.

        Raises:
            UserError: naming the number.
        """
        if self.overlap and rows % 2:
            raise UserError(
                f"overlap needs an even number of rows on every device, not {rows}; change the "
                "micro-batch or set overlap to False."
            )


class Chosen(NamedTuple):
    """Tokens, and the experts that each has chosen; of one device."""

    x_TD: Float[Array, "T D"]
    experts_TK: Int[Array, "T K"]
    gates_TK: Float[Array, "T K"]


def routed_experts(
    parts: Sequence[Chosen],
    weights: ExpertWeights,
    precision: Precision,
    parallel: ExpertParallel,
    groups: tuple[int, int] = (1, 1),
) -> list[Float[Array, "T D"]]:
    """Sum over each token's K experts of gate * FFN(x) (V3 Eq. 12), in the compute dtype.

    ``weights`` are the experts of this device; ``experts_TK`` counts all experts. ``groups``:
    into how many the experts are divided, and of how many a token chooses. The parts, all of one
    size, do not wait for one another: while one's tokens travel another's can be computed.
    """
    parts = [part._replace(x_TD=part.x_TD.astype(precision.compute_dtype)) for part in parts]

    def compute(x, fp8, experts, gates, weights, most=None):
        return local_experts(x, experts, gates, weights, precision, most, fp8)

    devices = sharding.parts("expert")
    with jax.named_scope("dispatch"):
        sent = [fp8_rows(part.x_TD, precision) for part in parts]
    if devices == 1:
        outs = [
            compute(part.x_TD, fp8, part.experts_TK, part.gates_TK, weights).with_gradient(
                precision.compute_dtype
            )
            for part, fp8 in zip(parts, sent, strict=True)
        ]
    elif parallel.dispatcher == "ring" or (
        parallel.dispatcher == "auto" and sharding.platform() == "cpu"
    ):
        outs = [_ring(part, fp8, weights, compute) for part, fp8 in zip(parts, sent, strict=True)]
    else:
        most = most_receivers(parts[0].experts_TK.shape[1], devices, *groups)
        outs = _ragged(parts, sent, weights, compute, parallel.receive_factor, most)
    return [sharding.psum(out.astype(precision.compute_dtype), "expert_mlp") for out in outs]


# --- ring ------------------------------------------------------------------------------------


def _ring(
    part: Chosen, fp8: Fp8Rows | None, weights: ExpertWeights, compute: Callable[..., Outputs]
) -> jax.Array:
    """The tokens go round, and with them the sum of what their experts have made of them.

    So they do again for the gradients: nothing is kept but a device's own tokens, and what is in
    FP8 travels as FP8, which autodiff of the loop would not do.
    """
    devices, here = sharding.parts("expert"), weights.w1_EDF.shape[0]
    shape, dtype = part.x_TD.shape, part.x_TD.dtype

    def share(tokens, x, gates, weights):
        """What the experts of this device contribute to the tokens at hand."""
        _, fp8, experts, _ = tokens
        first = sharding.part_index("expert") * here
        own = (experts >= first) & (experts < first + here)
        return compute(x, fp8, jnp.where(own, experts - first, here), gates, weights)

    def of_tokens(tokens):
        x, _, _, gates = tokens
        return jnp.zeros(shape, dtype) if x is None else x, gates

    def on(travelling):
        return jax.tree.map(lambda a: sharding.to_neighbour(a, "expert"), travelling)

    @jax.custom_vjp
    def run(x, gates, weights, still):
        return forward(x, gates, weights, still)[0]

    def forward(x, gates, weights, still):
        fp8, experts = still

        def step(carry, _):
            tokens, sum_TD = carry
            sum_TD += share(tokens, *of_tokens(tokens), weights).y_TD
            return on((tokens, sum_TD)), None

        tokens = (x if fp8 is None else None, fp8, experts, gates)
        carry = tokens, jnp.zeros(shape, jnp.float32)
        # After the last step they are home again.
        (tokens, sum_TD), _ = jax.lax.scan(step, carry, length=devices)
        return sum_TD, (tokens, weights)

    def backward(saved, ct_TD):
        tokens, weights = saved
        # The sum was rounded to the tokens' dtype, so its gradient is of that dtype.
        ct_TD = ct_TD.astype(dtype)
        ct = (ct_TD, None) if tokens[1] is None else (None, fp8_gradient(ct_TD))

        def step(carry, _):
            (tokens, ct, dx_TD, dgates_TK), dweights = carry
            _, pullback = jax.vjp(functools.partial(share, tokens), *of_tokens(tokens), weights)
            unread = jnp.zeros(shape, jnp.float32)
            own = Outputs(unread if ct[0] is None else ct[0].astype(jnp.float32), ct[1])
            dx, dgates, dw = pullback(own)
            travelling = tokens, ct, dx_TD + dx, dgates_TK + dgates
            return (on(travelling), jax.tree.map(jnp.add, dweights, dw)), None

        travelling = tokens, ct, jnp.zeros(shape, jnp.float32), jnp.zeros_like(tokens[-1])
        carry = travelling, jax.tree.map(jnp.zeros_like, weights)
        (travelling, dweights), _ = jax.lax.scan(step, carry, length=devices)
        _, _, dx_TD, dgates_TK = travelling
        return dx_TD.astype(dtype), dgates_TK, dweights, None

    run.defvjp(forward, backward)
    return run(part.x_TD, part.gates_TK, weights, (fp8, part.experts_TK))


# --- ragged all-to-all -----------------------------------------------------------------------


def most_receivers(top_k: int, devices: int, n_group: int, topk_group: int) -> int:
    """How many devices a token can be sent to (V3 section 2.1.2, node-limited routing)."""
    if devices % n_group == 0:
        return min(top_k, topk_group * (devices // n_group))
    if n_group % devices == 0:  # a device holds whole groups
        return min(top_k, topk_group, devices)
    return min(top_k, devices)


class Exchange(NamedTuple):
    """Slices of rows that change devices; entry i is the part of device i of the expert axis."""

    send_offsets_N: Int[Array, "N"]
    send_sizes_N: Int[Array, "N"]
    recv_offsets_N: Int[Array, "N"]
    recv_sizes_N: Int[Array, "N"]
    there_offsets_N: Int[Array, "N"]
    """Where on device i my slice is put."""
    back_offsets_N: Int[Array, "N"]
    """Where on device i the slice that it sent me was taken from."""

    def back(self) -> "Exchange":
        """The same slices, returned to where they came from."""
        return Exchange(
            self.recv_offsets_N,
            self.recv_sizes_N,
            self.send_offsets_N,
            self.send_sizes_N,
            self.back_offsets_N,
            self.there_offsets_N,
        )


def plan_exchange(offsets_N: Int[Array, "N"], sizes_N: Int[Array, "N"]) -> Exchange:
    """Tell every device what it will get; slices arrive end to end, in the senders' order."""
    own = jnp.stack([offsets_N, sizes_N], axis=1)
    # Everybody hears everything: one collective, where every extra one is a wait for all.
    offsets_NN, sizes_NN = jnp.moveaxis(sharding.all_gather(own[None], "expert", 0), 2, 0)
    me = sharding.part_index("expert")
    earlier_NN = jnp.cumsum(sizes_NN, axis=0) - sizes_NN  # [sender, receiver]
    recv_sizes = sizes_NN[:, me]
    return Exchange(
        offsets_N, sizes_N, earlier_NN[:, me], recv_sizes, earlier_NN[me], offsets_NN[:, me]
    )


def _arriving(a: jax.Array, ex: Exchange, size: int) -> jax.Array:
    # FP8 goes as bytes, whatever a backend makes of its formats.
    sent = jax.lax.bitcast_convert_type(a, jnp.uint8) if a.dtype.itemsize == 1 else a
    arrived = sharding.ragged_all_to_all(
        sent,
        size,
        ex.send_offsets_N,
        ex.send_sizes_N,
        ex.there_offsets_N,
        ex.recv_sizes_N,
        "expert",
    )
    return jax.lax.bitcast_convert_type(arrived, a.dtype) if sent is not a else arrived


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange(
    rows_SD: jax.Array, ex: Exchange, size: int, only: Literal["forward", "backward"] | None = None
) -> jax.Array:
    """The rows that arrive, in a buffer of ``size`` rows that is otherwise zero.

    Its gradient is the exchange back. ``only``: in the other direction nothing is sent, since
    nobody reads it (``Fp8Rows``, ``Outputs``).
    """
    if only == "backward":
        return jnp.zeros((size, *rows_SD.shape[1:]), rows_SD.dtype)
    return _arriving(rows_SD, ex, size)


def _exchange_bwd(size: int, only: str | None, saved: tuple[Exchange, int], ct: jax.Array) -> Any:
    ex, rows = saved
    if only == "forward":
        return jnp.zeros((rows, *ct.shape[1:]), ct.dtype), None
    return _arriving(ct, ex.back(), rows), None


exchange.defvjp(
    lambda rows_SD, ex, size, only: (exchange(rows_SD, ex, size, only), (ex, len(rows_SD))),
    _exchange_bwd,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchange_together(
    gates_SK: jax.Array, others: Sequence[jax.Array], ex: Exchange, size: int
) -> tuple[jax.Array, list[jax.Array]]:
    """Short rows in one message, which is a tile's width on TPU anyway; the gates have a gradient.

    ``others`` come back in the gates' float32.
    """
    columns = [gates_SK, *others]
    message = jnp.concatenate([a.astype(gates_SK.dtype) for a in columns], axis=1)
    ends = np.cumsum([a.shape[1] for a in columns])
    gates, *others = jnp.split(_arriving(message, ex, size), ends[:-1], axis=1)
    return gates, others


_exchange_together.defvjp(
    lambda gates_SK, others, ex, size: (
        _exchange_together(gates_SK, others, ex, size),
        (ex, len(gates_SK)),
    ),
    lambda size, saved, ct: (_arriving(ct[0], saved[0].back(), saved[1]), None, None),
)


class _Outgoing(NamedTuple):
    """The rows a device sends, sorted by receiver and, within it, by round."""

    experts_SK: jax.Array
    """Each row's experts, counted on its receiver from 1; 0: none. No more than it has."""
    receiver_S: jax.Array
    round_S: jax.Array
    """In which round each row goes; negative: not a row."""
    starts_N: jax.Array
    """First row of each receiver."""
    rounds: jax.Array
    """Rounds of the whole expert axis: 1 unless the routing is skewed."""
    fp8: Fp8Rows | None = None
    """The rows, where it is FP8 that is sent."""


def _ragged(
    parts: Sequence[Chosen],
    sent: Sequence[Fp8Rows | None],
    weights: ExpertWeights,
    compute: Callable[..., Outputs],
    factor: float,
    most: int,
) -> list[jax.Array]:
    (T, K), N = parts[0].experts_TK.shape, sharding.parts("expert")
    here = weights.w1_EDF.shape[0]
    # A device can receive no more than every token of the axis with as many experts as it has.
    worst = N * T * min(K, here)
    # Pairs are counted out to rounds by their first; the last row of a round may overhang.
    pairs_size = min(worst, _whole_tiles(int(factor * T * K) + K - 1))
    window = worst if pairs_size == worst else pairs_size - (K - 1)
    rows_size = min(pairs_size, N * T)

    def outgoing(
        part: Chosen, fp8: Fp8Rows | None
    ) -> tuple[Pairs, jax.Array, jax.Array, _Outgoing]:
        # Each token's receivers, without repetition.
        owner_TK = jnp.sort(part.experts_TK // here, axis=1)
        again_TK = jnp.pad(owner_TK[:, 1:] == owner_TK[:, :-1], ((0, 0), (1, 0)))
        rows = sorted_pairs(jnp.where(again_TK, N, owner_TK), N, T * most)
        x_SD = to_pairs(part.x_TD, rows, fp8 is not None)
        out, first_SK = _outgoing(part.experts_TK[rows.token_M], rows.sizes_G, here, window)
        gates_SK = jnp.take_along_axis(to_pairs(part.gates_TK, rows), first_SK, axis=1)
        return rows, x_SD, gates_SK, out._replace(fp8=fp8 and fp8.take(rows.token_M))

    def one_round(index, x_SD, gates_SK, weights, rows):
        goes = jax.nn.one_hot(rows.receiver_S, N, dtype=jnp.int32)
        before_N = ((rows.round_S >= 0) & (rows.round_S < index))[:, None] * goes
        now_N = (rows.round_S == index)[:, None] * goes
        ex = plan_exchange(rows.starts_N + before_N.sum(0), now_N.sum(0))
        x = exchange(x_SD, ex, rows_size, None if rows.fp8 is None else "backward")
        short = [rows.experts_SK] if rows.fp8 is None else [rows.experts_SK, rows.fp8.scales_Tk]
        gates, (experts, *scales) = _exchange_together(gates_SK, short, ex, rows_size)
        fp8 = rows.fp8 and Fp8Rows(_arriving(rows.fp8.values_TD, ex, rows_size), *scales)
        experts = jnp.where(experts == 0, here, experts.astype(jnp.int32) - 1)
        out = compute(x, fp8, experts, gates, weights, pairs_size)
        home = functools.partial(exchange, ex=ex.back(), size=len(x_SD))
        y = home(out.y_TD.astype(x_SD.dtype), only=None if out.way is None else "forward")
        way = jax.tree.map(functools.partial(home, only="backward"), out.way)
        return Outputs(y, way).with_gradient(x_SD.dtype)

    def round_of_all(index, x, gates, weights, out):
        each = zip(x, gates, out, strict=True)
        return tuple(one_round(index, x, gates, weights, out) for x, gates, out in each)

    rows, x, gates, out = zip(*map(outgoing, parts, sent), strict=True)
    if window == worst:
        returned = round_of_all(0, x, gates, weights, out)
    else:
        returned = _all_rounds(round_of_all)(x, gates, weights, out)
    return [from_pairs(y_SD, pairs) for y_SD, pairs in zip(returned, rows, strict=True)]


def _whole_tiles(rows: int) -> int:
    """Up to whole tiles of the grouped matmul, which would otherwise copy its rows to pad them."""
    return -(-rows // 512) * 512 if rows > 512 else rows


def _outgoing(
    experts_SK: jax.Array, sizes_N: jax.Array, here: int, window: int
) -> tuple[_Outgoing, jax.Array]:
    """Work out who gets which rows when; and which of a row's choices its receiver has.

    ``experts_SK`` are the choices of each row's token, of all experts.
    """
    S, N = len(experts_SK), len(sizes_N)
    ends_N = jnp.cumsum(sizes_N)
    starts_N = ends_N - sizes_N
    receiver_S = (jnp.arange(S)[:, None] >= ends_N).sum(1)  # N past the last row
    there_SK = experts_SK // here == receiver_S[:, None]
    local_SK = jnp.where(there_SK, experts_SK % here, here)
    first_SK = compact(local_SK, here)
    local_SK = jnp.take_along_axis(local_SK, first_SK, axis=1)
    local_SK = jnp.where(local_SK == here, 0, local_SK + 1)
    pairs_S = there_SK.sum(1)
    before_S = jnp.cumsum(pairs_S) - pairs_S
    pairs_N = jnp.zeros(N, pairs_S.dtype).at[receiver_S].add(pairs_S, mode="drop")
    from_NN = sharding.all_gather(pairs_N[None], "expert", 0)  # [sender, receiver]
    earlier_N = jnp.where(jnp.arange(N)[:, None] < sharding.part_index("expert"), from_NN, 0).sum(0)
    own = jnp.minimum(receiver_S, N - 1)
    at_S = before_S - (jnp.cumsum(pairs_N) - pairs_N)[own] + earlier_N[own]
    round_S = jnp.where(receiver_S < N, at_S // window, -1)
    rounds = jnp.maximum(-(-from_NN.sum(0).max() // window), 1)
    return _Outgoing(local_SK, receiver_S, round_S, starts_N, rounds), first_SK


def _all_rounds(one_round: Callable[..., Any]) -> Callable[..., Any]:
    """The sum of all rounds, with its gradient.

    By hand, for their number depends on the data. The first round keeps its activations like any
    layer; later ones, which only skewed routing has, are computed again. They come after the
    first round of every part, because nothing overlaps with a loop that communicates.
    """

    def rounds(out: Sequence[_Outgoing]) -> jax.Array:
        return functools.reduce(jnp.maximum, [part.rounds for part in out])

    @jax.custom_vjp
    def run(x, gates, weights, out):
        return forward(x, gates, weights, out)[0]

    def forward(x, gates, weights, out):
        floats = (x, gates, weights)
        y, pullback = jax.vjp(lambda *floats: one_round(0, *floats, out), *floats)

        def add_round(i, total):
            return jax.tree.map(jnp.add, total, one_round(i, *floats, out))

        return jax.lax.fori_loop(1, rounds(out), add_round, y), (pullback, floats, out)

    def backward(saved, ct):
        pullback, floats, out = saved

        def add_round(i, total):
            again = jax.vjp(lambda *floats: one_round(i, *floats, out), *floats)[1]
            return jax.tree.map(jnp.add, total, again(ct))

        return *jax.lax.fori_loop(1, rounds(out), add_round, pullback(ct)), None

    run.defvjp(forward, backward)
    return run
