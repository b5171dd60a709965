"""TPU kernels compile ahead of time, for chips that nobody needs to have."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import linear, quantize, reference
from pallas_kernels.reference import Quantized
from pallas_kernels.tpu import grouped_matmul, matmul, mla_attention
from pallas_kernels.tpu.matmul import takes_fp8

pytest.importorskip("libtpu")


each_chip = pytest.mark.parametrize(
    ("topology", "native_fp8"), [("v5p:2x2x1", False), ("v6e:2x2", False), ("tpu7x:2x2x1", True)]
)


def shapes_on(topology):
    """Of arrays on one chip of a topology."""
    chip = topologies.get_topology_desc(topology, "tpu").devices[0]

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(chip))

    return shape


@each_chip
@pytest.mark.parametrize("b_in_tiles", [False, True], ids=["blocks", "tiles"])
@pytest.mark.parametrize(("m", "n", "k"), [(4096, 7168, 2048), (1000, 576, 7168), (300, 200, 520)])
def test_fp8_matmul(topology, native_fp8, b_in_tiles, m, n, k):
    shape = shapes_on(topology)
    tiles = -(-k // 128)
    a = Quantized(shape(m, k, dtype=reference.E4M3), shape(tiles, m))
    scale = shape(tiles, n) if b_in_tiles else shape(-(-n // 128), tiles)
    b = Quantized(shape(n, k, dtype=reference.E4M3), scale)
    multiply = jax.jit(lambda a, b: matmul.fp8_matmul(a, b, native_fp8=native_fp8))
    assert multiply.lower(a, b).compile() is not None


@each_chip
@pytest.mark.parametrize(
    ("m", "k", "n", "groups"), [(4096, 7168, 4096, 8), (1000, 2048, 7168, 64), (264, 384, 256, 3)]
)
def test_fp8_grouped(topology, native_fp8, m, k, n, groups):
    shape = shapes_on(topology)
    sizes = shape(groups, dtype=jnp.int32)

    def rows(a, a_scale, b, b_scale, sizes):
        a, b = Quantized(a, a_scale), Quantized(b, b_scale)
        return grouped_matmul.fp8_grouped_matmul(a, b, sizes, native_fp8=native_fp8)

    a = shape(m, k, dtype=reference.E4M3), shape(k // 128, m)
    b = shape(groups, n, k, dtype=reference.E4M3), shape(groups, n // 128, k // 128)
    assert jax.jit(rows).lower(*a, *b, sizes).compile() is not None

    def wgrad(a, a_scale, b, b_scale, sizes):
        a, b = Quantized(a, a_scale), Quantized(b, b_scale)
        tiles = quantize.ragged_tiles(sizes, m)
        return grouped_matmul.fp8_grouped_wgrad(a, b, tiles, native_fp8=native_fp8)

    most = (m + 127 * groups) // 128
    a = shape(k, 128 * most, dtype=reference.E4M3), shape(most, k)
    b = shape(n, 128 * most, dtype=reference.E4M3), shape(most, n)
    assert jax.jit(wgrad).lower(*a, *b, sizes).compile() is not None


@each_chip
def test_layers_and_their_gradients(topology, native_fp8):
    """As they are called, in a mesh of one chip: by what it multiplies in is not said here."""
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    mesh = jax.sharding.Mesh([device], ("data",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((384, 256), jnp.bfloat16, sharding=where)
    w = jax.ShapeDtypeStruct((2, 256, 256), jnp.float32, sharding=where)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=where)

    def loss(x, w, sizes):
        y = linear.fp8_linear(x, w[0]) + linear.fp8_grouped_linear(x, w, sizes)
        y += linear.fp8_grouped_swiglu_ffn(x, x[:, 0], w, w, w, sizes)
        return y.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x, w, sizes)
        assert takes_fp8(None, interpret=False) == native_fp8
    text = lowered.compile().as_text()
    # Nine products, forward and of both gradients, and those of the network.
    assert text.count("tpu_custom_call") >= 9


@each_chip
@pytest.mark.parametrize(
    ("b", "t", "n", "s"),
    [(16, 1, 128, 4096), (16, 2, 128, 4096), (2, 16, 128, 4096), (3, 3, 5, 1000)],
)
def test_mla_decode(topology, native_fp8, b, t, n, s):
    """V3's decode step; a draft to check; a chunk of a prompt; what fills no block and no tile."""
    del native_fp8
    shape = functools.partial(shapes_on(topology), dtype=jnp.bfloat16)
    queries = shape(b, t, n, 512), shape(b, t, n, 64)
    layers = 61
    cache = shape(layers, b, s, 512), shape(layers, b, s, 64)
    ints = shape(b, dtype=jnp.int32), shape(dtype=jnp.int32)
    decode = jax.jit(functools.partial(mla_attention.mla_decode, scale=0.1))
    memory = decode.lower(*queries, *cache, *ints).compile().memory_analysis()
    # Queries may be copied; of the cache not one layer is, its narrow rotary part included.
    assert memory.temp_size_in_bytes < 2 * b * (t * n * (512 + 64) + s * 64)
