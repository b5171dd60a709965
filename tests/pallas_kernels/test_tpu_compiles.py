"""TPU kernels compile ahead of time, for chips that nobody needs to have (pip install libtpu)."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import reference
from pallas_kernels.reference import Quantized
from pallas_kernels.tpu import matmul

pytest.importorskip("libtpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks a metadata server, and waits


@pytest.mark.parametrize(
    ("topology", "native_fp8"), [("v5p:2x2x1", False), ("v6e:2x2", False), ("tpu7x:2x2x1", True)]
)
@pytest.mark.parametrize("b_in_tiles", [False, True], ids=["blocks", "tiles"])
@pytest.mark.parametrize(("m", "n", "k"), [(4096, 7168, 2048), (1000, 576, 7168), (300, 200, 520)])
def test_fp8_matmul(topology, native_fp8, b_in_tiles, m, n, k):
    chip = topologies.get_topology_desc(topology, "tpu").devices[0]

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(chip))

    tiles = -(-k // 128)
    a = Quantized(shape(m, k, dtype=reference.E4M3), shape(tiles, m))
    scale = shape(tiles, n) if b_in_tiles else shape(-(-n // 128), tiles)
    b = Quantized(shape(n, k, dtype=reference.E4M3), scale)
    multiply = jax.jit(lambda a, b: matmul.fp8_matmul(a, b, native_fp8=native_fp8))
    assert multiply.lower(a, b).compile() is not None
