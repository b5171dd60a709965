"""Weight gradients ragged along the contracted axis, and the differentiable Hopper op around them.

On a Hopper GPU: ``JAX_PLATFORMS=cuda pytest -m gpu tests/pallas_kernels``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul as op
from pallas_kernels.hopper import grouped_wgrad as hopper

# NumPy, which simulates the tensor cores, warns where a sum is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

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
# Empty groups at both ends and in the middle, one row, boundaries off every multiple of 8.
SIZES = [[128, 128], [100, 0, 28, 77], [0, 3, 130, 0, 1, 0], [0, 0, 64], [0, 0], [7, 57, 64, 65]]

row_steps = jax.jit(hopper.row_steps)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 200]), min_size=7, max_size=7))
def test_steps_cover_each_group_and_their_insides_hold_no_other(sizes):
    first, steps = map(np.asarray, row_steps(jnp.asarray(sizes, jnp.int32)))
    for group, end in enumerate(np.cumsum(sizes)):
        start = end - sizes[group]
        assert first[group] % 8 == 0
        assert steps[group] <= -(-(sizes[group] + 7) // 64), "work is proportional to rows"
        if sizes[group] == 0:
            assert steps[group] == 0
            continue
        assert first[group] <= start < first[group] + 64
        assert first[group] + 64 * (steps[group] - 1) < end <= first[group] + 64 * steps[group]


def matrices(sizes, k, n, padding, seed=0):
    """Rows and their gradients in bfloat16; what is past the last group is not finite."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((sum(sizes) + padding, width)) for width in (k, n))
    x[sum(sizes) :], dy[sum(sizes) :] = np.nan, np.inf
    return (*(jnp.asarray(a, jnp.bfloat16) for a in (x, dy)), jnp.asarray(sizes, jnp.int32))


def exact(x, dy, sizes):
    """In float64: the gradients, and the sums of the magnitudes of their terms."""
    x, dy = (np.asarray(a, np.float64) for a in (x, dy))
    ends = np.cumsum(sizes)
    groups = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [np.stack([f(x[own]).T @ f(dy[own]) for own in groups]) for f in (np.array, np.abs)]


@simulated_and_real
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("k", "n", "padding", "out_dtype"),
    [
        (192, 320, 5, jnp.float32),
        (64, 64, 0, jnp.float32),
        (128, 256, 70, jnp.bfloat16),
        (320, 64, 0, jnp.bfloat16),
    ],
)
def test_matches_float64(sizes, k, n, padding, out_dtype, interpret):
    x, dy, group_sizes = matrices(sizes, k, n, padding)
    if len(x) == 0:
        pytest.skip("no rows at all")
    got = hopper.grouped_wgrad(x, dy, group_sizes, out_dtype=out_dtype, interpret=interpret)
    assert got.dtype == out_dtype
    want, magnitude = exact(x, dy, sizes)
    rounding = 2.0**-8 if out_dtype == jnp.bfloat16 else 0
    # Tensor cores truncate sums of BF16 products to about FP32's own precision.
    bound = (sum(sizes) * 2.0**-23) * magnitude + rounding * np.abs(want)
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()


@simulated_and_real
def test_what_one_group_overflows_stays_there(interpret):
    sizes = [61, 3, 70]
    x, dy, group_sizes = matrices(sizes, 64, 128, 0)
    clean = hopper.grouped_wgrad(x, dy, group_sizes, interpret=interpret)
    x, dy = x.at[61:64].set(jnp.nan), dy.at[62].set(jnp.inf)
    got = hopper.grouped_wgrad(x, dy, group_sizes, interpret=interpret)
    np.testing.assert_array_equal(got[::2], clean[::2])
    assert np.isnan(got[1]).all()


@simulated_and_real
@pytest.mark.parametrize("sizes", [[100, 0, 28, 77], [0, 3, 130, 0, 1]], ids=str)
def test_the_differentiable_op(sizes, interpret):
    """Value and both gradients, with rows past the last group, under jit."""
    x, dy, group_sizes = matrices(sizes, 128, 192, 9)
    w = jax.random.normal(jax.random.key(0), (len(sizes), 128, 192), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, x, w, dy):
        y, vjp = jax.vjp(lambda x, w: f(x, w, group_sizes), x, w)
        return y, *vjp(dy)

    got = run(lambda *args: op._hopper(*args, interpret), x, w, dy)
    want = run(lambda *args: op.grouped_matmul(*args, impl="blocked"), x, w, dy)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        a, b = (np.asarray(z, np.float32) for z in (a, b))
        np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=2.0**-8 * np.abs(b).max())


@pytest.mark.gpu
def test_auto_is_the_kernel_on_the_device():
    x, _, group_sizes = matrices([100, 28], 128, 192, 9)
    w = jax.random.normal(jax.random.key(0), (2, 128, 192), jnp.bfloat16)
    assert op._pick(x, w) == "hopper"
    assert op._pick(x.astype(jnp.float32), w) == "blocked"
    got = op.grouped_matmul(x, w, group_sizes)
    np.testing.assert_array_equal(got, op.grouped_matmul(x, w, group_sizes, impl="hopper"))


@pytest.mark.parametrize("check_vma", [False, True])
def test_gradients_lower_inside_shard_map(check_vma):
    """For a mesh of GPUs, without any: rows sharded over experts, under jit, grad and scan."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec

    def local(x, w, sizes):
        def layer(x, _):
            return op.grouped_matmul(x, w, sizes, impl="hopper"), None

        return jax.lax.scan(layer, x, None, length=2)[0]

    e = P("expert")
    f = jax.shard_map(local, mesh=mesh, in_specs=(e, e, e), out_specs=e, check_vma=check_vma)

    def loss(x, w, sizes):
        return (f(x, w, sizes).astype(jnp.float32) ** 2).sum()

    shape = jax.ShapeDtypeStruct
    args = shape((512, 256), jnp.bfloat16), shape((8, 256, 256), jnp.bfloat16)
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(*args, shape((8,), jnp.int32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_without_a_device(out_dtype):
    shape = jax.ShapeDtypeStruct
    x, dy = shape((1000, 2048), jnp.bfloat16), shape((1000, 7168), jnp.bfloat16)
    wgrad = functools.partial(hopper.grouped_wgrad, out_dtype=out_dtype)
    traced = jax.jit(wgrad).trace(x, dy, shape((8,), jnp.int32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_it_cannot_take_is_named():
    x, dy, group_sizes = matrices([8], 96, 64, 0)
    with pytest.raises(ValueError, match="multiples of 64, not 96 and 64"):
        hopper.grouped_wgrad(x, dy, group_sizes)
    w = jnp.zeros((1, 96, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="impl='hopper' needs bfloat16, and K and N"):
        op.grouped_matmul(x, w, group_sizes, impl="hopper")
