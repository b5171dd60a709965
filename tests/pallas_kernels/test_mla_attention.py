"""Attention over the latent cache: reference, TPU and Hopper kernels, and the model's own loop.

On a Hopper GPU: ``JAX_PLATFORMS=cuda pytest -m gpu tests/pallas_kernels/test_mla_attention.py``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.model import attention
from deepseek_jax.types import KVCache
from pallas_kernels import mla_attention, reference
from pallas_kernels.tpu import mla_attention as tpu

SCALE = 0.07
LAYERS = 2

# T, N, S and the lengths of the rows. S is off every multiple of the block, though of 8, which the
# Hopper kernel wants; a row is empty, one is full to the last query and one past it; some queries
# stand before slot 0 and see nothing.
CASES = [
    (1, 16, 296, [0, 1, 127, 295]),
    (2, 128, 296, [0, 255, 256, 294]),
    (3, 16, 200, [-3, -1, 128, 199]),
    (1, 1, 104, [57]),
    (3, 1, 256, [253, 0]),
    (5, 128, 200, [150]),
]
each_case = pytest.mark.parametrize(
    ("T", "N", "S", "lengths"), CASES, ids=lambda x: str(x).replace(" ", "")
)


def draw(T, N, S, lengths, *, R=128, P=16, dtype=jnp.bfloat16, unseen=0.0):
    """Queries, the cache with ``unseen`` where no query looks, and lengths."""
    rng = np.random.default_rng(0)
    B = len(lengths)
    shapes = (B, T, N, R), (B, T, N, P), (LAYERS, B, S, R), (LAYERS, B, S, P)
    q_nope, q_pe, c_kv, k_pe = (rng.standard_normal(shape) for shape in shapes)
    past = np.arange(S) >= np.asarray(lengths)[:, None] + T
    c_kv[:, past], k_pe[:, past] = unseen, unseen
    arrays = [jnp.asarray(x, dtype) for x in (q_nope, q_pe, c_kv, k_pe)]
    return *arrays, jnp.asarray(lengths, jnp.int32)


@functools.partial(jax.jit, static_argnames=("f", "options"))
def run(f, *args, options=()):
    return f(*args, scale=SCALE, **dict(options))


def in_float32(q_nope, q_pe, c_kv, k_pe, length, layer):
    """The definition, without the result's rounding."""
    operands = (x.astype(jnp.float32) for x in (q_nope, q_pe, c_kv, k_pe))
    return run(reference.mla_decode, *operands, length, layer)


def assert_near(got, want):
    """To the rounding of weights and result to BF16."""
    assert got.dtype == jnp.bfloat16
    want = np.asarray(want)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), want, rtol=2.0**-7, atol=2.0**-8 * np.abs(want).max()
    )


def by_hand(q_nope, q_pe, c_kv, k_pe, length, layer):
    """One query at a time, over the slots that it sees and no others."""
    q_nope, q_pe, c_kv, k_pe = (np.asarray(x, np.float64) for x in (q_nope, q_pe, c_kv, k_pe))
    out = np.zeros(q_nope.shape)
    for b, t, n in np.ndindex(q_nope.shape[:3]):
        seen = max(int(length[b]) + t + 1, 0)
        if seen:
            keys = c_kv[layer, b, :seen]
            scores = keys @ q_nope[b, t, n] + k_pe[layer, b, :seen] @ q_pe[b, t, n]
            weights = np.exp(SCALE * (scores - scores.max()))
            out[b, t, n] = weights @ keys / weights.sum()
    return out


@each_case
@pytest.mark.parametrize("unseen", [0.0, np.nan])
def test_the_reference_is_softmax_over_what_is_seen(T, N, S, lengths, unseen):
    args = *draw(T, min(N, 3), S, lengths, R=24, P=6, dtype=jnp.float32, unseen=unseen), 1
    np.testing.assert_allclose(in_float32(*args), by_hand(*args), atol=1e-5)


@pytest.mark.parametrize(("T", "N", "S", "lengths"), CASES[:2])
def test_the_models_loop_equals_the_reference(T, N, S, lengths, monkeypatch):
    monkeypatch.setattr(attention, "KEY_BLOCK", 128)
    q_nope, q_pe, c_kv, k_pe, length = draw(T, N, S, lengths, dtype=jnp.float32, unseen=1e9)
    cache = KVCache(c_kv, k_pe, length)
    assert not mla_attention.has_kernel(q_nope, q_pe, c_kv, k_pe)
    got = jax.jit(attention.attend_absorbed, static_argnums=4)(q_nope, q_pe, cache, 1, SCALE)
    want = in_float32(q_nope, q_pe, c_kv, k_pe, length, 1)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_model_takes_the_kernel_where_one_fits(monkeypatch):
    """All but a cache in FP8, whose scales no kernel reads."""
    *operands, length = draw(2, 16, 200, [5, 100], unseen=np.nan)
    cache = KVCache(operands[2], operands[3], length)
    monkeypatch.setattr(mla_attention.backend, "platform", lambda: "tpu")
    simulated = functools.partial(tpu.mla_decode, interpret=True)
    monkeypatch.setattr(tpu, "mla_decode", simulated)
    got = jax.jit(attention.attend_absorbed, static_argnums=4)(*operands[:2], cache, 1, SCALE)
    assert_near(got, in_float32(*operands, length, 1))

    def refuse(*args, **options):
        raise AssertionError("called")

    monkeypatch.setattr(attention, "mla_decode", refuse)
    scale_LBSG = jnp.ones((LAYERS, 2, 200, 1))
    in_fp8 = cache._replace(
        c_kv_LBSR=operands[2].astype(reference.E4M3), k_pe_LBSP=operands[3], scale_LBSG=scale_LBSG
    )
    out = jax.eval_shape(
        functools.partial(attention.attend_absorbed, scale=SCALE), *operands[:2], in_fp8, 1
    )
    assert out.shape == operands[0].shape


# --- TPU --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_blocks():
    """For the whole module: what jit has compiled remembers the block that it saw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "_BLOCK", 128)
        yield


@pytest.mark.usefixtures("small_blocks")
@each_case
@pytest.mark.parametrize("unseen", [3e38, np.nan])
def test_tpu(T, N, S, lengths, unseen):
    args = *draw(T, N, S, lengths, unseen=unseen), jnp.int32(1)
    got = run(tpu.mla_decode, *args, options=(("interpret", True),))
    assert_near(got, in_float32(*args))


def test_tpu_takes_a_layer_that_is_known():
    args = *draw(2, 4, 300, [0, 200], P=64, unseen=np.nan), 1
    got = jax.jit(lambda *a: tpu.mla_decode(*a, 1, scale=SCALE, interpret=True))(*args[:-1])
    assert_near(got, in_float32(*args))


visits = jax.jit(tpu.visits, static_argnums=(1, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 1010), min_size=6, max_size=6), st.sampled_from([1, 2, 6]))
def test_visits_are_the_filled_blocks_in_order_and_no_row_is_shared(last, rows):
    S, block = 1000, 128
    bounds, row, at = map(np.asarray, visits(jnp.asarray(last[:rows], jnp.int32), S, block))
    want = [
        (b, j)
        for b in range(rows)
        for j in range(S // block + 1)
        if j == 0 or j * block <= min(last[b], S - 1)
    ]
    assert list(zip(row[: bounds[-1]], at[: bounds[-1]], strict=True)) == want
    assert len(bounds) == (2 if rows == 1 else 3)
    assert (np.diff(bounds) > 0).all()  # each core writes rows of its own
    assert all(at[first] == 0 for first in bounds[:-1])
    if rows > 1:  # and has half of the work, but for a row
        assert np.diff(bounds).max() <= bounds[-1] / 2 + S // block + 1


# --- Hopper -----------------------------------------------------------------------------------

needs_simulation = pytest.mark.skipif(
    tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11),
    reason="before 0.11, Pallas cannot simulate a transposed operand",
)
simulated_and_real = pytest.mark.parametrize(
    "interpret",
    [
        pytest.param(True, id="simulated", marks=needs_simulation),
        pytest.param(False, id="device", marks=pytest.mark.gpu),
    ],
)


@simulated_and_real
@each_case
@pytest.mark.parametrize("unseen", [1e30, np.nan])  # the simulation raises where 3e38 overflows
def test_hopper(T, N, S, lengths, unseen, interpret):
    from pallas_kernels.hopper import mla_attention as hopper

    args = *draw(T, N, S, lengths, R=512, P=64, unseen=unseen), jnp.int32(1)
    got = run(hopper.mla_decode, *args, options=(("interpret", interpret),))
    assert_near(got, in_float32(*args))


@needs_simulation
@pytest.mark.parametrize("splits", [2, 5])
def test_hopper_adds_up_parts_of_rows(splits):
    """Also where a part of a row has no slots at all."""
    from pallas_kernels.hopper import mla_attention as hopper

    args = *draw(1, 16, 296, [0, 130, 295], R=512, P=64, unseen=np.nan), jnp.int32(1)
    got = run(hopper.mla_decode, *args, options=(("interpret", True), ("splits", splits)))
    assert_near(got, in_float32(*args))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11")
@pytest.mark.parametrize("batch", [1, 128])
def test_hopper_lowers_at_the_shape_of_v3(batch):
    from pallas_kernels.hopper import mla_attention as hopper

    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = like(2, batch, 4096, 512), like(2, batch, 4096, 64)
    queries = like(batch, 1, 128, 512), like(batch, 1, 128, 64)
    lengths = like(batch, dtype=jnp.int32)
    decode = jax.jit(functools.partial(hopper.mla_decode, scale=SCALE))
    traced = decode.trace(*queries, *cache, lengths, like(dtype=jnp.int32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_slots_the_hopper_kernel_cannot_take():
    shapes = (2, 1, 128, 512), (2, 1, 128, 64)
    for slots, fits in [(64, True), (296, True), (56, False), (300, False)]:
        cache = (3, 2, slots, 512), (3, 2, slots, 64)
        arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes + cache]
        assert mla_attention._hopper_can(*arrays) == fits


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("splits", [None, 1, 5])
def test_hopper_on_long_rows(T, splits):
    from pallas_kernels.hopper import mla_attention as hopper

    args = *draw(T, 128, 5000, [4990, 0, 63, 2048], R=512, P=64, unseen=np.nan), jnp.int32(1)
    options = (("splits", splits),)
    got = run(hopper.mla_decode, *args, options=options)
    assert_near(got, in_float32(*args))
    np.testing.assert_array_equal(got, run(hopper.mla_decode, *args, options=options))


# --- the choice -------------------------------------------------------------------------------


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks for what a CPU lacks")
def test_explicit_impl_never_falls_back():
    args = *draw(1, 4, 128, [5]), 0
    with pytest.raises(ValueError, match="interpret mode"):
        mla_attention.mla_decode(*args, scale=SCALE, impl="tpu")
    with pytest.raises(ValueError, match=r"impl='hopper' cannot take bfloat16\[1, 1, 4, 128\]"):
        mla_attention.mla_decode(*args, scale=SCALE, impl="hopper")
    in_fp32 = *draw(1, 4, 128, [5], dtype=jnp.float32), 0
    with pytest.raises(ValueError, match="impl='tpu' cannot take float32"):
        mla_attention.mla_decode(*in_fp32, scale=SCALE, impl="tpu")


def test_auto_is_the_reference_where_no_kernel_runs():
    args = *draw(2, 4, 128, [5, 9]), 1
    got = run(mla_attention.mla_decode, *args)
    np.testing.assert_array_equal(got, run(reference.mla_decode, *args))


def test_rows_over_devices():
    """Inside `shard_map`, types checked: the reference states what varies."""
    q_nope, q_pe, c_kv, k_pe, length = draw(1, 4, 64, [0, 5, 63, 2, 7, 40, 41, 9])
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, stack = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec(None, "rows")
    decode = functools.partial(mla_attention.mla_decode, scale=SCALE)
    sharded = jax.shard_map(
        lambda *a: decode(*a, 1),
        mesh=mesh,
        in_specs=(rows, rows, stack, stack, rows),
        out_specs=rows,
    )
    got = jax.jit(sharded)(q_nope, q_pe, c_kv, k_pe, length)
    assert_near(got, in_float32(q_nope, q_pe, c_kv, k_pe, length, 1))
