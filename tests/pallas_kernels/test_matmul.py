"""Every implementation of the block-scaled matmul against float64, to the bound of its arithmetic.

On a Hopper GPU: ``JAX_PLATFORMS=cuda pytest -m gpu tests/pallas_kernels``.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import backend, matmul, quantize, reference
from pallas_kernels.hopper import matmul as hopper
from pallas_kernels.reference import Quantized
from pallas_kernels.tpu import matmul as tpu

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])

# Error of the sum of one tile relative to the sum of magnitudes. FP32 addition rounds by 2^-24 up
# to 128 times. Hopper's tensor cores keep about 14 bits of the largest product of each 32 and
# truncate (V3 section 3.5.2), four times in a tile. Where all terms have one sign the truncations
# add up: 5.7 * 2^-13 was measured on an H100.
FP32 = 128 * 2.0**-24
TENSOR_CORE = 8 * 2.0**-13

needs_cluster_simulation = pytest.mark.skipif(
    JAX_VERSION < (0, 12), reason="before 0.12, Pallas simulates no clusters of blocks"
)
needs_simulation = pytest.mark.skipif(
    JAX_VERSION < (0, 11), reason="before 0.11, Pallas cannot simulate a transposed operand"
)


def simulated(**tiling):
    return functools.partial(hopper.fp8_matmul, tiling=hopper.Tiling(**tiling), interpret=True)


IMPLEMENTATIONS = [
    pytest.param(functools.partial(matmul.fp8_matmul, impl="reference"), FP32, id="reference"),
    pytest.param(functools.partial(tpu.fp8_matmul, interpret=True), FP32, id="tpu-simulated"),
    pytest.param(
        simulated(waves=1, shared="none", stages=2),
        FP32,
        id="hopper-simulated",
        marks=needs_simulation,
    ),
    pytest.param(
        functools.partial(matmul.fp8_matmul, impl="hopper"),
        TENSOR_CORE,
        id="hopper",
        marks=pytest.mark.gpu,
    ),
    pytest.param(
        functools.partial(matmul.fp8_matmul, impl="tpu"),
        FP32,
        id="tpu",
        marks=pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU"),
    ),
]
each_implementation = pytest.mark.parametrize(("multiply", "tile_error"), IMPLEMENTATIONS)


def operands(m, n, k, *, b_in_tiles=False, seed=0, positive=False):
    """Activations with a wide range of row magnitudes, and weights."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(m, k)) * np.exp(2 * rng.normal(size=(m, 1)))
    b = rng.normal(size=(n, k)) * np.exp(rng.normal(size=(n, 1)))
    if positive:
        a, b = np.abs(a), np.abs(b)
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    of_b = quantize.quantize_tiles if b_in_tiles else quantize.quantize_blocks
    return quantize.quantize_tiles(a), of_b(b)


def exact(a, b):
    """The product, and the product of the magnitudes, in float64."""
    a, b = (np.asarray(reference.dequantize(q), np.float64) for q in (a, b))
    return a @ b.T, np.abs(a) @ np.abs(b).T


def worst(got, a, b):
    """Largest error of an element, relative to the sum of magnitudes that it is made of."""
    want, magnitude = exact(a, b)
    return (np.abs(np.asarray(got, np.float64) - want) / np.maximum(magnitude, 1e-300)).max()


def check(multiply, tile_error, a, b, out_dtype=jnp.float32):
    got = multiply(a, b, out_dtype=out_dtype)
    assert got.shape == (a.values.shape[0], b.values.shape[0])
    assert got.dtype == out_dtype
    # Promotion adds one FP32 rounding per tile of K, and three for the scales.
    bound = tile_error + (a.scale.shape[0] + 3) * 2.0**-24
    bound += 2.0**-8 if out_dtype == jnp.bfloat16 else 0
    assert worst(got, a, b) <= bound


@each_implementation
@pytest.mark.parametrize(
    ("m", "n", "k"), [(128, 128, 128), (256, 256, 384), (200, 136, 300), (8, 64, 1300), (1, 1, 1)]
)
@pytest.mark.parametrize("b_in_tiles", [False, True], ids=["blocks", "tiles"])
def test_matches_float64(multiply, tile_error, m, n, k, b_in_tiles):
    check(multiply, tile_error, *operands(m, n, k, b_in_tiles=b_in_tiles))


@each_implementation
@pytest.mark.parametrize(("m", "n", "k"), [(8, 256, 384), (1, 192, 128), (72, 72, 300)])
def test_one_of_a_stack(multiply, tile_error, m, n, k):
    """Every layer's product is that of its matrix by itself, to the last bit."""
    a, _ = operands(m, n, k)
    layers = [operands(m, n, k, seed=seed)[1] for seed in range(3)]
    stack = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    if multiply.func is tpu.fp8_matmul:  # the choice of a backend cuts it out
        multiply = functools.partial(_cut_out_first, multiply)
    of_layer = jax.jit(lambda layer: multiply(a, stack._replace(layer=layer)))
    for layer, alone in enumerate(layers):
        np.testing.assert_array_equal(of_layer(jnp.int32(layer)), multiply(a, alone))


def _cut_out_first(multiply, a, b):
    return multiply(a, b.cut_out())


@each_implementation
@pytest.mark.parametrize("n", [8, 64, 96])
def test_bfloat16_result(multiply, tile_error, n):
    check(multiply, tile_error, *operands(72, n, 256), out_dtype=jnp.bfloat16)


def low_precision_sum(a, b, bits=14, products=32):
    """What adding up all of K in a tensor core's accumulator gives (V3 section 3.5.2).

    Exact sums of ``products`` products are added to an accumulator that keeps ``bits`` bits.
    """
    a, b = (np.asarray(reference.dequantize(q), np.float64) for q in (a, b))
    total = np.zeros((a.shape[0], b.shape[0]))
    for start in range(0, a.shape[1], products):
        total += a[:, start : start + products] @ b[:, start : start + products].T
        mantissa, exponent = np.frexp(total)
        total = np.ldexp(np.trunc(mantissa * 2**bits) / 2**bits, exponent)
    return total


@each_implementation
def test_long_sums_need_promotion(multiply, tile_error):
    """All terms positive and K = 8192: without promotion, truncation adds up."""
    a, b = operands(8, 64, 8192, positive=True)
    assert worst(low_precision_sum(a, b), a, b) > TENSOR_CORE + 2.0**-12, "else the test is idle"
    check(multiply, tile_error, a, b)


@each_implementation
def test_scales_may_differ_by_all_of_fp32(multiply, tile_error):
    a, b = operands(16, 64, 512)
    factors = jnp.asarray([1e-30, 1.0, 1e18, 1e-18], jnp.float32)
    check(multiply, tile_error, a._replace(scale=a.scale * factors[:, None]), b)


@each_implementation
def test_largest_values_cancel(multiply, tile_error):
    """+448 and -448 alternate, so that the sum is zero and any lost term shows."""
    signs = np.resize([1.0, -1.0], 256)
    values = jnp.asarray(np.tile(448 * signs, (64, 1)), reference.E4M3)
    a = Quantized(values, jnp.ones((2, 64)))
    b = Quantized(jnp.abs(values.astype(jnp.float32)).astype(reference.E4M3), jnp.ones((1, 2)))
    got = multiply(a, b, out_dtype=jnp.float32)
    np.testing.assert_array_equal(got, np.zeros((64, 64)))
    got = multiply(a, b._replace(values=a.values), out_dtype=jnp.float32)
    np.testing.assert_array_equal(got, np.full((64, 64), 256 * 448.0**2))


@each_implementation
def test_smallest_values_count(multiply, tile_error):
    """E4M3 denormals are not flushed: 2^-9 times 448, in every position of K."""
    a = Quantized(jnp.full((8, 128), 2.0**-9, reference.E4M3), jnp.ones((1, 8)))
    b = Quantized(jnp.full((64, 128), 448.0, reference.E4M3), jnp.ones((1, 1)))
    got = multiply(a, b, out_dtype=jnp.float32)
    np.testing.assert_array_equal(got, np.full((8, 64), 128 * 448 * 2.0**-9))


@each_implementation
def test_nan_stays_in_its_row(multiply, tile_error):
    x = np.random.default_rng(0).normal(size=(16, 256))
    x[3, 200], x[5, 7] = np.nan, np.inf
    a = quantize.quantize_tiles(jnp.asarray(x, jnp.float32))
    _, b = operands(1, 64, 256)
    got = np.asarray(multiply(a, b, out_dtype=jnp.float32))
    assert np.isnan(got[[3, 5]]).all()
    assert np.isfinite(np.delete(got, [3, 5], axis=0)).all()


@each_implementation
def test_of_nothing(multiply, tile_error):
    a, b = operands(8, 64, 128)
    none = Quantized(a.values[:0], a.scale[:, :0])
    assert multiply(none, b, out_dtype=jnp.float32).shape == (0, 64)


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("m", "n", "tiling"),
    [
        (512, 128, dict(waves=2, shared="none", stages=2, store_slots=2)),
        (320, 192, dict(waves=2, shared="none", stages=3)),
        (400, 256, dict(waves=1, warpgroups=3, shared="none", stages=3, store_slots=2)),
        pytest.param(256, 512, dict(waves=2, shared="a", stages=2), marks=needs_cluster_simulation),
        pytest.param(256, 384, dict(waves=1, shared="a", stages=2), marks=needs_cluster_simulation),
        pytest.param(768, 128, dict(waves=2, shared="b", stages=3), marks=needs_cluster_simulation),
    ],
)
@needs_simulation
@pytest.mark.parametrize("b_in_tiles", [False, True])
def test_hopper_tilings(m, n, tiling, out_dtype, b_in_tiles):
    """Several tiles per block, rings that wrap around, and clusters with a tile too few."""
    multiply = simulated(**tiling)
    check(multiply, FP32, *operands(m, n, 640, b_in_tiles=b_in_tiles), out_dtype=out_dtype)


@needs_simulation
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("m", [1, 8, 32, 64])
@pytest.mark.parametrize(("n", "k", "splits"), [(192, 640, 3), (8, 300, 2), (128, 256, 5)])
def test_few_rows_split_along_k(m, n, k, splits, out_dtype):
    """Parts of unequal size, of none (five of two steps), and of a last step cut short."""
    multiply = simulated(waves=1, warpgroups=1, shared="none", stages=2, splits=splits)
    check(multiply, FP32, *operands(m, n, k), out_dtype=out_dtype)


@needs_simulation
def test_a_split_of_one_of_a_stack():
    a, b = operands(8, 128, 640)
    stack = Quantized(jnp.stack([0 * b.values, b.values]), jnp.stack([b.scale, b.scale]))
    multiply = simulated(waves=1, warpgroups=1, shared="none", stages=2, splits=2)
    got = multiply(a, stack._replace(layer=jnp.int32(1)), out_dtype=jnp.float32)
    np.testing.assert_array_equal(got, multiply(a, b, out_dtype=jnp.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 32, 64])
@pytest.mark.parametrize(("n", "k"), [(2048, 7168), (2112, 7168), (24576, 1536), (72, 1000)])
def test_few_rows_on_the_device(m, n, k):
    """As many parts as the rule says, and others, with one consumer and with two."""
    a, b = operands(m, n, k)
    for warpgroups, splits in ((0, 0), (1, 1), (1, 3), (2, 4)):
        tiling = None
        if splits:
            tiling = hopper.Tiling(waves=1, warpgroups=warpgroups, shared="none", splits=splits)
        check(functools.partial(hopper.fp8_matmul, tiling=tiling), TENSOR_CORE, a, b)


@pytest.mark.parametrize("m", [1, 32, 64])
@pytest.mark.parametrize(("n", "k"), [(2048, 7168), (576, 7168), (7168, 16384), (24576, 1536)])
def test_few_rows_keep_multiprocessors_busy(m, n, k):
    """Either many read at once, or there are tiles enough; and no part of K is empty."""
    tiling = hopper.tiling_of_few_rows(m, n, k, multiprocessors=132)
    tiles, steps = -(-n // 128), k // 128
    assert tiles * tiling.splits >= 66
    assert (tiling.splits - 1) * -(-steps // tiling.splits) < steps


@pytest.mark.gpu
@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize("shared", ["none", "a", "b"])
def test_hopper_tilings_on_the_device(warpgroups, shared):
    """More tiles than multiprocessors, and a number of tiles that leaves a cluster half empty."""
    tiling = hopper.Tiling(waves=1, warpgroups=warpgroups, shared=shared)
    multiply = functools.partial(hopper.fp8_matmul, tiling=tiling)
    check(multiply, TENSOR_CORE, *operands(1100, 2700, 1000, b_in_tiles=True))


@pytest.mark.parametrize("b_in_tiles", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(4096, 7168, 2048), (4096, 576, 7168), (100, 100, 100), (1, 2048, 7168)]
)
def test_hopper_lowers_without_a_device(m, n, k, b_in_tiles):
    """Catches what a new jax changes in Pallas, where neither a GPU nor a simulation is at hand."""
    shape = jax.ShapeDtypeStruct
    tiles = -(-k // 128)
    a = Quantized(shape((m, k), reference.E4M3), shape((tiles, m), jnp.float32))
    scale = (tiles, n) if b_in_tiles else (-(-n // 128), tiles)
    b = Quantized(shape((n, k), reference.E4M3), shape(scale, jnp.float32))
    lowered = jax.jit(hopper.fp8_matmul).trace(a, b).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@settings(max_examples=4, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 700),
    st.booleans(),
    st.sampled_from(["reference", "tpu-simulated"]),
)
def test_any_shape(m, n, k, b_in_tiles, which):
    multiply = next(p.values[0] for p in IMPLEMENTATIONS if p.id == which)
    check(multiply, FP32, *operands(m, n, k, b_in_tiles=b_in_tiles, seed=m))


@pytest.mark.parametrize("impl", ["hopper", "tpu"])
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks for what a CPU lacks")
def test_explicit_impl_never_falls_back(impl):
    with pytest.raises(ValueError, match="interpret mode"):
        matmul.fp8_matmul(*operands(128, 128, 128), impl=impl)


def test_auto_says_once_what_it_picked(caplog):
    backend._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            matmul.fp8_matmul(*operands(8, 8, 8))
    assert [r.name for r in caplog.records if "fp8_matmul runs as" in r.getMessage()] == [
        "pallas_kernels.backend"
    ]


def test_that_no_kernel_is_taken_on_an_accelerator_is_a_warning(caplog, monkeypatch):
    backend._say_once.cache_clear()
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    with caplog.at_level(logging.INFO):
        backend.say_once("fp8_grouped_matmul", "reference")
        backend.say_once("fp8_matmul", "hopper")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "no kernel takes these shapes" in caplog.records[0].getMessage()


def test_what_is_compiled_for():
    """The default device, unless a mesh is set."""
    assert (backend.platform(), backend.device_kind()) == ("cpu", "cpu")
    with jax.default_device(jax.devices()[1]):
        assert backend.device_kind() == "cpu"
    with jax.default_device("cpu"):
        assert (backend.platform(), backend.device_kind()) == ("cpu", "cpu")


def test_a_left_operand_in_blocks_is_refused():
    a, b = operands(256, 128, 256)
    with pytest.raises(ValueError, match="left operand needs 1x128 tile scales"):
        matmul.fp8_matmul(quantize.quantize_blocks(reference.dequantize(a)), b)


def test_wrong_shapes_are_named():
    a, b = operands(8, 64, 256)
    with pytest.raises(ValueError, match="contracted sizes differ: 256 and 128"):
        matmul.fp8_matmul(a, b._replace(values=b.values[:, :128]))
    with pytest.raises(ValueError, match="neither 1x128 tiles nor 128x128 blocks"):
        matmul.fp8_matmul(a, b._replace(scale=b.scale[:, :1]))
