"""Grouped matmul against one NumPy product per group, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import reference as oracle
from pallas_kernels.grouped_matmul import _blocks as blocks
from pallas_kernels.grouped_matmul import grouped_matmul


def reference(x, w, sizes):
    ends = np.cumsum(sizes)
    parts = [
        x[end - size : end] @ w[g] for g, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return np.concatenate(parts)


def run(x, w, sizes, impl="blocked"):
    return grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.array(sizes, jnp.int32), impl=impl)


def draw(sizes, K=12, N=7, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((sum(sizes), K)), rng.standard_normal((len(sizes), K, N))
    return x.astype(dtype), w.astype(dtype)


@pytest.mark.parametrize("impl", ["blocked", "tpu"])
@pytest.mark.parametrize(
    "sizes", [[5, 0, 300, 1], [0, 0, 4], [400, 0, 0], [128, 128], [1], [0, 257, 127, 0]]
)
def test_equals_one_product_per_group(impl, sizes):
    x, w = draw(sizes)
    out = run(x, w, sizes, impl)
    np.testing.assert_allclose(out, reference(x, w, sizes), rtol=1e-5, atol=1e-5)


@jax.jit
def cotangents(x, w, sizes, dy):
    return jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl="blocked"), x, w)[1](dy)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(sum), st.integers(0, 10**6))
def test_gradients_equal_those_of_the_products(weights, seed):
    # One shape (it is compiled once), any split of the rows over the groups.
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(200, np.array(weights) / sum(weights))
    x, w = draw(sizes, seed=seed)
    dy = rng.standard_normal((200, 7)).astype(np.float32)
    dx, dw = cotangents(x, w, jnp.asarray(sizes, jnp.int32), dy)
    ends = np.cumsum(sizes)
    for g, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        rows = slice(end - size, end)
        np.testing.assert_allclose(dx[rows], dy[rows] @ w[g].T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dw[g], x[rows].T @ dy[rows], rtol=1e-4, atol=1e-4)


def test_bfloat16_sums_in_float32():
    sizes = [64, 64]
    x, w = draw(sizes, K=4096, N=4)
    out = grouped_matmul(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), jnp.array(sizes, jnp.int32)
    )
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w)]
    expected = reference(*rounded, sizes)
    # One rounding of the result, 2^-9 relative; summing in bfloat16 would be off by tens of that.
    assert out.dtype == jnp.bfloat16
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(out, np.float64) - expected).max() <= 2**-8 * scale


def test_other_groups_garbage_does_not_leak():
    sizes = [3, 130, 2]
    x, w = draw(sizes)
    clean = run(x, w, sizes)
    x = x.copy()
    x[3:133] = np.nan
    dirty = run(x, w, sizes)
    np.testing.assert_array_equal(
        np.delete(dirty, range(3, 133), 0), np.delete(clean, range(3, 133), 0)
    )


IMPLEMENTATIONS = ["reference", "blocked", "tpu"]


def by_name(impl):
    if impl == "reference":
        return functools.partial(oracle.grouped_matmul, out_dtype=jnp.float32)
    return functools.partial(grouped_matmul, impl=impl)


def value_and_gradients(impl, x, w, sizes, dy):
    x, w, dy = map(jnp.asarray, (x, w, dy))
    y, vjp = jax.vjp(lambda x, w: by_name(impl)(x, w, sizes), x, w)
    return y, *vjp(dy)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [[100, 0, 57], [0, 0, 0], [0, 200, 0], [1, 128, 1]])
@pytest.mark.parametrize("padding", [1, 130])
def test_rows_past_the_last_group_are_zero_and_touch_nothing(impl, sizes, padding):
    real = sum(sizes)
    x, w = draw([*sizes, padding])
    w = w[:-1]
    dy = np.random.default_rng(1).standard_normal((real + padding, 7)).astype(np.float32)
    clean = x[:real], w, jnp.asarray(sizes, jnp.int32), dy[:real]
    x[real:], dy[real:] = np.nan, np.nan
    y, dx, dw = value_and_gradients(impl, x, w, jnp.asarray(sizes, jnp.int32), dy)
    assert (np.asarray(y)[real:] == 0).all()
    assert (np.asarray(dx)[real:] == 0).all()
    if real == 0:
        assert (np.asarray(dw) == 0).all()
        return
    for got, want in zip((y[:real], dx[:real], dw), value_and_gradients(impl, *clean), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_padding_costs_no_work():
    """The loop runs over the blocks of the groups only, not over the length of the array."""
    x, w = draw([5, 1])
    x = np.pad(x, ((0, 10_000), (0, 0)))
    count, *_ = blocks(jnp.asarray([5, 1]), 128, 90)
    assert count == 2
    assert run(x, w, [5, 1]).shape == (10_006, 7)


# jax's own TPU kernels do not say what varies, so for them check_vma has to be off.
@pytest.mark.parametrize(
    ("impl", "check_vma"), [("blocked", False), ("blocked", True), ("tpu", False)]
)
def test_inside_shard_map_with_a_scan(impl, check_vma):
    """As expert parallelism calls it: sharded rows and matrices, one matrix scanned over."""
    shards, each = 4, 40
    mesh = jax.make_mesh((shards,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    sizes = jnp.array([[10, 0, 20], [0, 0, 0], [40, 0, 0], [1, 2, 3]], jnp.int32)
    x = rng.standard_normal((shards, each, 12)).astype(np.float32)
    for shard in range(shards):
        x[shard, sizes[shard].sum() :] = np.nan
    own = rng.standard_normal((shards, 3, 12, 12)).astype(np.float32)
    shared = rng.standard_normal((3, 12, 12)).astype(np.float32)  # the same on every device

    def layers(x, own, shared, sizes):
        def layer(x, _):
            x = grouped_matmul(x, own, sizes, impl=impl)
            return x / 12 + grouped_matmul(x, shared, sizes, impl=impl) / 12, None

        return jax.lax.scan(layer, x, None, length=2)[0]

    def local(x, own, shared, sizes):
        return layers(x[0], own[0], shared, sizes[0])[None]

    P = jax.sharding.PartitionSpec
    e = P("expert")
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(e, e, P(), e), out_specs=e, check_vma=check_vma
    )

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda *args: (f(*args, sizes) ** 2).sum(), (0, 1, 2)))

    def one_by_one(x, own, shared, sizes):
        return jnp.stack([layers(x[i], own[i], shared, sizes[i]) for i in range(shards)])

    got, want = loss(sharded)(x, own, shared), loss(one_by_one)(x, own, shared)
    assert np.isfinite(want[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
