"""FP8 linear layers against float64, to the error that rounding to E4M3 can make.

On a Hopper GPU: ``JAX_PLATFORMS=cuda pytest -m gpu tests/pallas_kernels``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear, quantize, reference
from pallas_kernels.hopper import matmul as hopper

needs_simulation = pytest.mark.skipif(
    tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 12),
    reason="before 0.12, Pallas simulates no clusters of blocks",
)
implementations = pytest.mark.parametrize(
    "impl", ["reference", pytest.param("hopper", marks=pytest.mark.gpu)]
)

# E4M3 rounds by half a step, 2^-4 of a number; its smallest step is 2^-9 of the scale, and so at
# most 2^-10 / 448 of the largest of a tile. Each term of a product has two rounded factors.
ROUNDING = 2.0**-4
PRODUCT = 2 * ROUNDING + ROUNDING**2
TINY = 2.0**-10 / 448 * 2


def arrays(m, k, n, dtype=jnp.float32, seed=0, groups=None):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * np.exp(rng.standard_normal((m, 1)))
    w = rng.standard_normal((k, n) if groups is None else (groups, k, n)) / k**0.5
    dy = rng.standard_normal((m, n)) * np.exp(rng.standard_normal((m, 1)))
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(dy, dtype)


def value_and_gradients(f, x, w, dy):
    y, vjp = jax.vjp(jax.jit(f), x, w)
    return y, *jax.jit(vjp)(dy)


def products(x, w, dy):
    """The three products, exactly, a bound of what rounding can change, and the contracted size."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))

    def one(a, b):
        floor = np.abs(a).max() * np.abs(b).max() * a.shape[1] * TINY
        return a @ b, np.abs(a) @ np.abs(b) * PRODUCT + floor, a.shape[1]

    return one(x, w), one(dy, w.T), one(x.T, dy)


def assert_within(got, exact, dtypes):
    for a, (want, bound, contracted), dtype in zip(got, exact, dtypes, strict=True):
        assert a.dtype == dtype
        a = np.asarray(a, np.float64)
        bound = bound * 1.01 + (2.0**-8 * np.abs(want) if dtype == jnp.bfloat16 else 0)
        assert (np.abs(a - want) <= bound).all()
        # The bound holds for the worst case; on average errors cancel.
        assert np.linalg.norm(a - want) <= 0.05 * np.linalg.norm(want)
        # The only element of a tile is the largest, and is rounded by nothing.
        if contracted > 50:
            assert np.linalg.norm(a - want) >= 0.005 * np.linalg.norm(want), "this was not FP8"


@implementations
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("m", "k", "n"), [(256, 384, 256), (200, 130, 72)])
def test_linear(m, k, n, dtype, impl):
    x, w, dy = arrays(m, k, n, dtype)
    f = jax.jit(functools.partial(linear.fp8_linear, impl=impl))
    got = value_and_gradients(f, x, w, dy)
    assert_within(got, products(x, w, dy), (dtype, dtype, jnp.float32))


@implementations
@pytest.mark.parametrize("sizes", [[100, 0, 57, 70], [0, 256, 0], [1, 130, 2]])
def test_grouped_linear(sizes, impl):
    m, k, n = 264, 256, 384
    x, w, dy = arrays(m, k, n, jnp.bfloat16, groups=len(sizes))
    x, dy = (a.at[sum(sizes) :].set(jnp.nan) for a in (x, dy))
    group_sizes = jnp.asarray(sizes, jnp.int32)
    f = jax.jit(lambda x, w: linear.fp8_grouped_linear(x, w, group_sizes, impl=impl))
    y, dx, dw = value_and_gradients(f, x, w, dy)
    assert (np.asarray(y, np.float32)[sum(sizes) :] == 0).all()
    assert (np.asarray(dx, np.float32)[sum(sizes) :] == 0).all()
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.float32
    for g, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        own = slice(end - size, end)
        if size == 0:
            assert (np.asarray(dw[g]) == 0).all()
        else:
            assert_within((y[own], dx[own], dw[g]), products(x[own], w[g], dy[own]), dtypes)


def test_one_group_is_the_linear_layer():
    x, w, dy = arrays(256, 128, 128)
    sizes = jnp.asarray([256], jnp.int32)
    one = value_and_gradients(linear.fp8_linear, x, w, dy)
    f = lambda x, w: linear.fp8_grouped_linear(x, w[None], sizes)  # noqa: E731
    for a, b in zip(value_and_gradients(f, x, w, dy), one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


def test_groups_do_not_disturb_each_other():
    """A group's gradient is the same whatever the others hold: no scale is shared."""
    x, w, dy = arrays(256, 128, 128, groups=3)
    sizes = jnp.asarray([50, 100, 90], jnp.int32)

    def dw(x, dy):
        return value_and_gradients(lambda x, w: linear.fp8_grouped_linear(x, w, sizes), x, w, dy)[2]

    clean = dw(x, dy)
    louder = dw(x.at[50:150].multiply(1e6), dy.at[50:150].set(jnp.inf))
    np.testing.assert_array_equal(louder[::2], clean[::2])


# --- feed-forward networks -----------------------------------------------------------------------


class Ffn:
    """A network's arguments and gradient, of 256 rows in groups and 8 of padding, or of 256."""

    def __init__(self, grouped, k=256, d=128, n=256, sizes=(100, 0, 156)):
        self.grouped, self.rows = grouped, 256
        m, groups = (264, len(sizes)) if grouped else (256, None)
        x, w1, _ = arrays(m, d, k, jnp.bfloat16, groups=groups)
        w3 = arrays(m, d, k, seed=1, groups=groups)[1]
        _, w2, dy = arrays(m, k, n, jnp.bfloat16, seed=2, groups=groups)
        factors = jnp.linspace(0.1, 2, m)
        x, dy, factors = (a.at[self.rows :].set(jnp.nan) for a in (x, dy, factors))
        self.sizes = jnp.asarray(sizes, jnp.int32)
        self.dy, self.weights = dy, (w1, w3, w2)
        self.given = (x, factors) if grouped else (x,)

    def layer(self, *args, **options):
        if self.grouped:
            return linear.fp8_grouped_swiglu_ffn(*args, self.sizes, **options)
        return linear.fp8_swiglu_ffn(*args, **options)

    def product(self, x, w, impl):
        if self.grouped:
            return linear.fp8_grouped_linear(x, w, self.sizes, impl=impl)
        return linear.fp8_linear(x, w, impl=impl)

    def piece_by_piece(self, impl):
        """The result, and its gradients with gate and up rounded to FP8 in between, nothing else.

        So they are kept for the backward pass (V3 section 3.3.3). SwiGLU's gradient is in FP32
        where it is quantized by row, and rounded to the rows' dtype where it is by column.
        """
        product = functools.partial(self.product, impl=impl)
        (x, *factors), (w1, w3, w2) = self.given, self.weights

        def outer(gate_up, factors, w2):
            return product(reference.swiglu(gate_up, *factors).astype(x.dtype), w2)

        w13 = jnp.concatenate([w1, w3], axis=-1)
        gate_up, inner_vjp = jax.vjp(product, x, w13)
        rounded = reference.dequantize(quantize.quantize_tiles(gate_up))
        d_gate_up, d_factors, dw2 = jax.vjp(outer, rounded, factors, w2)[1](self.dy)
        of_fp32 = functools.partial(self.product, impl="reference")
        dx = jax.vjp(of_fp32, x.astype(jnp.float32), w13)[1](d_gate_up)[0].astype(x.dtype)
        dw = inner_vjp(d_gate_up.astype(x.dtype))[1]
        return (
            outer(gate_up, factors, w2),
            *(dx, *d_factors, *jnp.split(dw, 2, axis=-1), dw2),
        )

    def exactly(self):
        """The gradients in float32, as autodiff has them."""

        def f(x, factors, w1, w3, w2):
            gate, up = x @ w1, x @ w3
            return (jax.nn.silu(gate) * up * factors[:, None]) @ w2

        ends = np.cumsum(self.sizes) if self.grouped else [self.rows]
        x, factors, dy = self.given[0], jnp.ones(self.rows), self.dy
        factors = self.given[1] if self.grouped else factors
        found = []
        for g, end in enumerate(ends):
            own = slice(end - int(self.sizes[g]) if self.grouped else 0, int(end))
            ws = [w[g] if self.grouped else w for w in self.weights]
            args = [a[own].astype(jnp.float32) for a in (x, factors)]
            found.append(jax.vjp(f, *args, *ws)[1](dy[own].astype(jnp.float32)))
        dx, dfactors, *dw = zip(*found, strict=True)
        rows = (jnp.concatenate(dx), *((jnp.concatenate(dfactors),) if self.grouped else ()))
        return *rows, *((jnp.stack(w) if self.grouped else w[0]) for w in dw)


def assert_near(a, b, tolerance):
    """As a whole, and element by element beside the largest; of the same dtype."""
    assert a.dtype == b.dtype
    a, b = (np.asarray(z, np.float64) for z in (a, b))
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@implementations
@pytest.mark.parametrize("grouped", [False, True])
def test_ffn_is_its_products_and_swiglu(grouped, impl):
    ffn = Ffn(grouped)
    args = *ffn.given, *ffn.weights
    # Not as one program: within one, XLA need not round to BF16 between a product and SwiGLU.
    y, vjp = jax.vjp(functools.partial(ffn.layer, impl=impl), *args)
    for i, (a, b) in enumerate(zip((y, *vjp(ffn.dy)), ffn.piece_by_piece(impl), strict=True)):
        if i < 1 + len(ffn.given):
            assert (np.asarray(a, np.float32)[ffn.rows :] == 0).all()
            a, b = a[: ffn.rows], b[: ffn.rows]
        # A kernel's exp differs in its last bits, which may tip a BF16 number, and so one of E4M3.
        assert_near(a, b, 2.0**-8 if impl == "reference" else 0.02)
    kept = jax.tree.leaves(vjp)
    eight_bits = sum(a.size for a in kept if a.dtype == reference.E4M3)
    columns = len(quantize.ragged_tiles(ffn.sizes, 264).first_T) * 128 if grouped else 256
    x, gate_up = ffn.given[0], 2 * len(ffn.given[0]) * ffn.weights[0].shape[-1]
    weights = sum(w.size for w in ffn.weights)
    assert eight_bits == x.shape[1] * columns + gate_up + weights
    scales_and_factors = sum(a.nbytes for a in kept) - eight_bits
    assert scales_and_factors <= 4 * (eight_bits // 128 + len(x) + 8)


@implementations
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("k", [256, 200])
def test_gradients_of_an_ffn_are_near_those_in_float32(k, grouped, impl):
    if impl == "hopper" and k % 128:
        pytest.skip("no kernel")
    ffn = Ffn(grouped, k=k)
    args = *ffn.given, *ffn.weights
    _, vjp = jax.vjp(jax.jit(functools.partial(ffn.layer, impl=impl)), *args)
    for i, (a, b) in enumerate(zip(jax.jit(vjp)(ffn.dy), ffn.exactly(), strict=True)):
        a, b = (np.asarray(z, np.float64) for z in (a[: len(b)] if i < len(ffn.given) else a, b))
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        # Each rounding to E4M3 is one of 2.6% on average, and w1's gradient comes after ten: both
        # operands of gate and up, both of these again, of dh and of itself.
        assert 0.005 < error < 0.12


@implementations
def test_a_gradient_returned_in_fp8(impl):
    """It gives what the same gradient gives unquantized, where quantizing changes no bit of it."""
    ffn = Ffn(True, sizes=(128, 0, 128))
    args = *(a[: ffn.rows] for a in ffn.given), *ffn.weights
    m, n = ffn.rows, ffn.dy.shape[1]
    dy = jnp.clip(ffn.dy[:m] * 30, -400, 400).astype(reference.E4M3).astype(jnp.bfloat16)
    # The largest number of E4M3 in every tile of either axis: all scales are one.
    largest = jnp.arange(m)[:, None] % 128 == jnp.arange(n) % 128
    dy = jnp.where(largest, 448, dy)
    q = quantize.quantize_tiles(dy, power_of_two=True)
    np.testing.assert_array_equal(q.scale, 1)

    def gradients(layer, ct):
        y, vjp = jax.vjp(lambda *args: layer(*args, ffn.sizes, impl=impl), *args)
        return y, jax.jit(vjp)(ct)

    y, want = gradients(linear.fp8_grouped_swiglu_ffn, dy)
    unread = jnp.full_like(dy, jnp.nan)
    (same, _), got = gradients(linear.fp8_grouped_swiglu_ffn_returned, (unread, q))
    for a, b in zip((same, *got), (y, *want), strict=True):
        np.testing.assert_array_equal(a, b)


@implementations
def test_weights_side_by_side(impl):
    """Results and gradients are those of one by one, but for how the gradients of x are summed."""
    x, w, dy = arrays(256, 256, 256, jnp.bfloat16)
    v = arrays(256, 256, 128, seed=1)[1]
    dy = jnp.concatenate([dy, dy[:, :128] * 3], axis=1)
    layer = functools.partial(linear.fp8_linear, impl=impl)

    def gradients(f):
        y, vjp = jax.vjp(jax.jit(f), x, w, v)
        return y, *jax.jit(vjp)(dy)

    got = gradients(lambda x, w, v: layer(x, (w, v)))
    want = gradients(lambda x, w, v: jnp.concatenate([layer(x, w), layer(x, v)], axis=1))
    for name, a, b in zip(["y", "dx", "dw", "dv"], got, want, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(z, np.float32) for z in (a, b))
        if name == "dx":  # rounded to BF16 once, not thrice
            np.testing.assert_allclose(a, b, atol=2.0**-7 * np.abs(b).max())
        else:
            np.testing.assert_array_equal(a, b)
    # What comes quantized, or would share a block, is multiplied one by one.
    q = quantize.quantize_blocks(w)
    narrow = v[..., :70]
    for pair in ((q, v), (narrow, w)):
        each = [np.asarray(layer(x, a), np.float32) for a in pair]
        np.testing.assert_array_equal(
            np.asarray(layer(x, pair), np.float32), np.concatenate(each, 1)
        )


@pytest.mark.parametrize("policy", [jax.checkpoint_policies.everything_saveable, None])
def test_tokens_in_fp8_survive_rematerialisation(policy):
    """What `jax.checkpoint` keeps must still be E4M3, whose numbers reach to 448."""
    ffn = Ffn(True)
    x, factors = (jnp.nan_to_num(a) for a in ffn.given)
    q = quantize.quantize_tiles(x, power_of_two=True)
    assert jnp.abs(q.values.astype(jnp.float32)).max() >= 256
    tokens = linear.as_bytes(q.values)

    def layer(x, w1, w3, w2, tokens):
        rows = reference.Quantized(linear.from_bytes(tokens), q.scale)
        return ffn.layer(x, factors, w1, w3, w2, quantized=rows)

    def gradients(f):
        y, vjp = jax.vjp(lambda *args: f(*args, tokens), x, *ffn.weights)
        return y, *vjp(ffn.dy)

    got = gradients(jax.jit(jax.checkpoint(layer, policy=policy)))
    for a, b in zip(got, gradients(jax.jit(layer)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert np.isfinite(np.asarray(a, np.float32)).all()


def test_what_is_kept_for_the_backward_pass_is_in_fp8():
    x, w, _ = arrays(256, 384, 512, jnp.bfloat16)
    _, vjp = jax.vjp(linear.fp8_linear, x, w)
    kept = [a for a in jax.tree.leaves(vjp) if a.size]
    eight_bits = sum(a.size for a in kept if a.dtype == reference.E4M3)
    assert eight_bits == x.size + w.size
    scales = sum(a.size for a in kept if a.dtype == jnp.float32)
    assert scales == x.size // 128 + w.size // 128**2
    assert sum(a.nbytes for a in kept) == eight_bits + 4 * scales


@pytest.mark.parametrize("check_vma", [False, True])
def test_inside_shard_map(check_vma):
    """Weights the same on all devices: their gradients are summed over them."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w, _ = arrays(4 * 128, 128, 128)
    wg = jnp.stack([w, 2 * w])
    sizes = jnp.asarray([[100, 28], [0, 0], [5, 6], [128, 0]], jnp.int32)
    P = jax.sharding.PartitionSpec

    def local(x, w, wg, sizes):
        y = linear.fp8_linear(x, w) + linear.fp8_grouped_linear(x, wg, sizes[0])
        y += linear.fp8_swiglu_ffn(x, w, w, w)
        return y + linear.fp8_grouped_swiglu_ffn(x, x[:, 0], wg, wg, wg, sizes[0])

    rows = P("data")
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, P(), P(), rows), out_specs=rows, check_vma=check_vma
    )

    def one_by_one(x, w, wg, sizes):
        parts = zip(x.reshape(4, 128, -1), sizes, strict=True)
        return jnp.concatenate([local(x, w, wg, s[None]) for x, s in parts])

    def gradients(f):
        return jax.jit(jax.grad(lambda *args: (f(*args, sizes) ** 2).sum(), (0, 1, 2)))

    got, want = gradients(sharded)(x, w, wg), gradients(one_by_one)(x, w, wg)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


SIZES = [[128, 0, 140], [0, 3, 250, 0, 1], [0, 0]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(dict(interpret=True), id="simulated", marks=needs_simulation),
        pytest.param(dict(), id="device", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_hopper_grouped_wgrad(out_dtype, how, sizes):
    m = 272
    tiles = quantize.ragged_tiles(jnp.asarray(sizes, jnp.int32), m)
    x, _, dy = arrays(m, 256, 384)
    a, b = (reference.quantize_tiles_ragged(z, tiles) for z in (x, dy))
    count = int(tiles.count[0])
    # What lies in tiles of no group must not matter.
    a = a._replace(scale=a.scale.at[count:].set(jnp.nan))
    got = hopper.fp8_grouped_wgrad(a, b, tiles, out_dtype=out_dtype, **how)
    want = np.asarray(reference.fp8_grouped_wgrad(a, b, tiles), np.float64)
    assert got.dtype == out_dtype
    assert np.isfinite(want).all()
    a, b = (q._replace(values=jnp.abs(q.values.astype(jnp.float32))) for q in (a, b))
    magnitude = np.asarray(reference.fp8_grouped_wgrad(a, b, tiles), np.float64)
    # Tensor cores cut each of 32 products off at 13 bits below the largest of them, and here a few
    # large rows stand above the others.
    rounding = 2.0**-8 if out_dtype == jnp.bfloat16 else 0
    bound = (1e-5 if how else 32 * 2.0**-13) * magnitude + rounding * np.abs(want)
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()


def test_hopper_grouped_wgrad_lowers_without_a_device():
    shape = jax.ShapeDtypeStruct
    tiles = jax.eval_shape(lambda sizes: quantize.ragged_tiles(sizes, 1000), shape((8,), jnp.int32))
    most = len(tiles.first_T)
    a, b = (
        reference.Quantized(
            shape((side, 128 * most), reference.E4M3), shape((most, side), jnp.float32)
        )
        for side in (7168, 2048)
    )
    traced = jax.jit(hopper.fp8_grouped_wgrad).trace(a, b, tiles)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks for what a CPU lacks")
def test_explicit_impl_never_falls_back():
    x, w, _ = arrays(128, 128, 128)
    with pytest.raises(ValueError, match="interpret mode"):
        linear.fp8_linear(x, w, impl="hopper")
    with pytest.raises(ValueError, match="a bfloat16 result"):
        linear.fp8_grouped_linear(x, w[None], jnp.asarray([128], jnp.int32), impl="hopper")


# --- weights that come quantized -------------------------------------------------------------


@implementations
@pytest.mark.parametrize("grouped", [False, True])
def test_a_quantized_weight_is_taken_as_it_is(impl, grouped):
    """The result and the input's gradient are those of the weight that it was quantized from."""
    x, w, dy = arrays(256, 384, 256, jnp.bfloat16, groups=3 if grouped else None)
    sizes = (jnp.asarray([100, 0, 120]),) if grouped else ()
    layer = linear.fp8_grouped_linear if grouped else linear.fp8_linear

    @jax.jit
    def both(x, w):
        y, vjp = jax.vjp(lambda x: layer(x, w, *sizes, impl=impl), x)
        return y, vjp(dy)[0]

    for a, b in zip(both(x, w), both(x, quantize.quantize_blocks(w)), strict=True):
        np.testing.assert_array_equal(a, b)


@implementations
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("frozen", [(0, 1, 2), (0,), (2,)], ids=str)
def test_quantized_weights_of_an_ffn(frozen, grouped, impl):
    """All is what it is with the weights that they were quantized from; they have no gradient."""
    ffn = Ffn(grouped)
    ws = [quantize.quantize_blocks(w) if i in frozen else w for i, w in enumerate(ffn.weights)]
    free = [i for i in range(3) if i not in frozen]

    def gradients(ws):
        def f(given, trained):
            of = dict(zip(free, trained, strict=True))
            return ffn.layer(*given, *(of.get(i, w) for i, w in enumerate(ws)), impl=impl)

        args = ffn.given, [ws[i] for i in free]
        y, vjp = jax.vjp(jax.jit(f), *args)
        return y, *jax.tree.leaves(jax.jit(vjp)(ffn.dy))

    for i, (a, b) in enumerate(zip(gradients(ws), gradients(ffn.weights), strict=True)):
        if i == 1:  # rounded to BF16 once for both, or once for each
            assert_near(a[: ffn.rows], b[: ffn.rows], 2.0**-7)
        else:
            np.testing.assert_array_equal(a, b)
