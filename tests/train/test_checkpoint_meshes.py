"""A checkpoint saved on one mesh restores on any other, bit for bit and where it belongs."""

import jax
import numpy as np

from deepseek_jax import DeepSeekV3, sharding
from deepseek_jax.checkpoint import Checkpointer
from deepseek_jax.train.optim import OptimConfig, make_optimizer
from deepseek_jax.train.step import abstract_state
from deepseek_jax.types import TrainState
from tests.configs import MICRO

# From many devices to one and back.
MESHES = ["data=8", "data=2,fsdp=4", "data=2,expert=4", "data=1"]
MODEL = DeepSeekV3(
    MICRO.replace(
        vocab_size=64, num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0
    )
)


def abstract_on(mesh: str, optim: OptimConfig) -> TrainState:
    count = 1 if mesh == "data=1" else 8
    return abstract_state(
        MODEL, make_optimizer(optim, 10), sharding.make_mesh(mesh, jax.devices()[:count])
    )


def random_state(abstract: TrainState) -> TrainState:
    """All bit patterns are fair game, in parameters, moments, routing bias and step."""
    rng = np.random.default_rng(0)

    def leaf(x):
        raw = rng.integers(0, 256, size=(*x.shape, x.dtype.itemsize), dtype=np.uint8)
        return jax.device_put(raw.view(x.dtype)[..., 0], x.sharding)

    return jax.tree.map(leaf, abstract)


def test_from_mesh_to_mesh(tmp_path):
    optim = OptimConfig(moments="bfloat16")
    state = first = random_state(abstract_on(MESHES[0], optim))
    for step, mesh in enumerate(MESHES[1:], 1):
        with Checkpointer(tmp_path) as saver:
            saver.save(step, state, data_state={}, rng=jax.random.key(0))
            saver.wait()
            abstract = abstract_on(mesh, optim)
            back = saver.restore_latest(abstract)
        assert back is not None
        assert back.step == step
        state = back.state
        leaves = [jax.tree.leaves_with_path(tree) for tree in (state, first, abstract)]
        for (path, ours), (_, saved), (_, wanted) in zip(*leaves, strict=True):
            assert ours.sharding == wanted.sharding, path
            assert ours.dtype == saved.dtype, path
            assert np.asarray(ours).tobytes() == np.asarray(saved).tobytes(), path


def test_these_meshes_do_divide_the_state():
    """Else the test above would move nothing."""
    for mesh in MESHES:
        divided = [
            leaf
            for leaf in jax.tree.leaves(abstract_on(mesh, OptimConfig()))
            if leaf.sharding.shard_shape(leaf.shape) != leaf.shape
        ]
        assert bool(divided) == (mesh not in ("data=8", "data=1")), mesh
