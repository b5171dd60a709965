"""Meshes by name, and the table of axes."""

import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from deepseek_jax import UserError, preset, sharding
from deepseek_jax.model.transformer import DeepSeekV3, abstract_params, logical_axes


def test_mesh_is_written_as_axis_sizes():
    mesh = sharding.make_mesh("data=2,expert=4")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "context": 1, "tensor": 1}
    assert dict(sharding.make_mesh("fsdp=-1,tensor=2").shape)["fsdp"] == 4
    assert sharding.batch_shards(mesh) == 8


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data=3", "8"),
        ("data=16", "8"),
        ("rows=2", "rows"),
        ("data=two", "data=two"),
        ("data=0", "data=0"),
        ("data=2,data=4", "twice"),
        ("data=-1,fsdp=-1", "one axis"),
        ("data=-1,tensor=3", "8"),
    ],
)
def test_impossible_meshes_are_refused(text, named):
    with pytest.raises(UserError, match=named):
        sharding.make_mesh(text)


def test_every_parameter_states_an_axis_for_each_dimension():
    model = DeepSeekV3(preset("v3"))
    axes, shapes = logical_axes(model), abstract_params(model)
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    for names, leaf in zip(
        jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(shapes), strict=True
    ):
        assert len(names) == leaf.ndim
        assert all(name is None or name in sharding.LOGICAL_AXES for name in names)
    mesh = sharding.make_mesh("fsdp=2,expert=2,tensor=2")
    where = sharding.param_shardings(mesh, axes, shapes)
    assert where["moe_layers"]["moe"]["w1"].spec == P(None, "expert", ("fsdp", "context"), "tensor")
    assert where["moe_layers"]["attn"]["wq_b"].spec == P(
        None, ("fsdp", "context"), ("tensor", "expert"), None
    )


def test_an_axis_that_must_divide_and_does_not_is_named():
    model = DeepSeekV3(preset("v2_lite"))  # 16 heads, 64 experts
    axes, shapes = logical_axes(model), abstract_params(model)
    with pytest.raises(UserError, match=r"tensor=32 does not divide the 16 of axis 'heads'"):
        sharding.param_specs(AbstractMesh((1, 1, 1, 1, 32), sharding.MESH_AXES), axes, shapes)
    with pytest.raises(UserError, match="expert=48 does not divide the 64 of axis 'expert'"):
        sharding.param_specs(AbstractMesh((1, 1, 48, 1, 1), sharding.MESH_AXES), axes, shapes)


def test_an_axis_that_only_stores_is_left_out_where_it_does_not_divide():
    mesh = AbstractMesh((1, 5, 2, 1, 1), sharding.MESH_AXES)
    assert sharding.param_spec(mesh, ("embed", "mlp"), (24, 40)) == P(
        "context", ("tensor", "expert")
    )
    assert sharding.param_spec(mesh, ("embed", "mlp"), (25, 41)) == P(("fsdp", "context"), "tensor")


@pytest.mark.parametrize(
    ("platform", "processes", "expert", "some"),
    [("gpu", 1, 2, True), ("gpu", 2, 2, False), ("gpu", 1, 1, False), ("tpu", 1, 2, False)],
)
def test_options_are_for_exchanges_among_the_gpus_of_one_process(platform, processes, expert, some):
    def device(i):
        return types.SimpleNamespace(platform=platform, process_index=i * processes // 2)

    mesh = mock.create_autospec(jax.sharding.Mesh, instance=True)
    mesh.devices = np.array([device(i) for i in range(2)])
    mesh.shape = {"data": 2 // expert, "expert": expert}
    assert bool(sharding.exchange_options(mesh)) == some


def test_a_message_in_pieces_is_the_message():
    """Both ends cut alike, nothing is left out, and an empty piece stays within the message."""
    sizes = jnp.array([10, 0, 3, 7], jnp.int32)
    offsets, there = jnp.array([0, 10, 10, 13]), jnp.array([5, 2, 0, 40])
    cut = sharding.in_pieces(offsets, sizes, there, sizes[::-1], 4)
    starts, lengths, puts, received = (np.asarray(a).reshape(4, 4) for a in cut)
    np.testing.assert_array_equal(received, lengths[::-1])
    np.testing.assert_array_equal(lengths.max(1), [3, 0, 1, 2])
    for i in range(4):
        rows = [r for s, n in zip(starts[i], lengths[i], strict=True) for r in range(s, s + n)]
        assert rows == list(range(int(offsets[i]), int(offsets[i] + sizes[i])))
        np.testing.assert_array_equal(puts[i] - starts[i], there[i] - offsets[i])
        assert (starts[i] + lengths[i] <= offsets[i] + sizes[i]).all()
