"""Bytes per kind of collective and mesh axis, by hand and from programs compiled for 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import sharding
from deepseek_jax.plan import hlo
from deepseek_jax.plan.collectives import axes_of, collectives, parse_groups
from tests.plan.programs import COLLECTIVES

MESH = {"data": 2, "expert": 4}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_in_every_form_that_xla_writes(text, expected):
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
    assert parse_groups(attributes, 4).tolist() == expected


def test_axes_are_those_along_which_a_group_differs():
    groups = np.arange(8)
    assert axes_of(groups.reshape(2, 4), MESH) == ("expert",)
    assert axes_of(groups.reshape(2, 4).T, MESH) == ("data",)
    assert axes_of(groups.reshape(1, 8), MESH) == ("data", "expert")
    assert axes_of(np.array([[0, 2], [1, 3], [4, 6], [5, 7]]), MESH) == ("expert",)  # part of it


def test_each_kind_by_hand():
    found = {one.name: one for one in collectives(hlo.parse(COLLECTIVES), MESH)}
    size = 8 * 64 * 2
    expected = {
        "ag": ("all-gather", ("data",), size * 1),
        "rs": ("reduce-scatter", ("data", "expert"), size * 7 / 8),
        "ar": ("all-reduce", ("expert",), size * 2 * 3 / 4),
        "ar.2": ("reduce-scatter", ("expert",), size * 3 / 4),
        "a2a.1": ("all-to-all", ("expert",), size * 3 / 4),
        "ra": ("ragged-all-to-all", ("expert",), size * 3 / 4),
        "cp": ("collective-permute", ("expert",), size),
        "half": ("collective-permute", ("data",), size * 2 / 8),
    }
    assert {n: (c.kind, c.axes, c.sent) for n, c in found.items()} == expected
    assert [n for n, c in found.items() if c.is_async] == ["ag", "a2a.1"]
    assert found["ag"].source == "jit(f)/all_gather"
    assert found["ra"].buffer == "bf16[8,64]"


def _compiled(body, x_spec, out_spec, x):
    mesh = sharding.make_mesh("data=2,expert=4")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(x_spec,), out_specs=out_spec, check_vma=False)
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x_spec))
    return hlo.parse(jax.jit(mapped).lower(x).compile().as_text()), mesh.shape


def _sent(program, shape):
    total: dict[tuple[str, tuple[str, ...]], float] = {}
    for one in collectives(program, shape):
        key = one.kind, one.axes
        total[key] = total.get(key, 0) + one.total
    return total


# Per device [64, 32] float32 = 8192 bytes. Axis sizes: data 2, expert 4.
@pytest.mark.parametrize(
    ("name", "operation", "expected"),
    [
        ("gather", lambda x: jax.lax.all_gather(x, "expert").sum(0), ("all-gather", 3 * 8192)),
        (
            "scatter",
            lambda x: jnp.tile(jax.lax.psum_scatter(x, "expert", tiled=True), (4, 1)),
            ("reduce-scatter", 8192 * 3 / 4),
        ),
        ("reduce", lambda x: jax.lax.psum(x, "expert"), ("all-reduce", 2 * 8192 * 3 / 4)),
        (
            "exchange",
            lambda x: jax.lax.all_to_all(x, "expert", 0, 0, tiled=True),
            ("all-to-all", 8192 * 3 / 4),
        ),
        (
            "ring",
            lambda x: jax.lax.ppermute(x, "expert", [(i, (i + 1) % 4) for i in range(4)]),
            ("collective-permute", 8192),
        ),
    ],
)
def test_a_compiled_loop_sends_what_it_does_on_paper(name, operation, expected):
    """Five trips around one collective over the expert axis."""

    def body(x):
        # The product keeps the collective from being hoisted or merged.
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(operation(x)), x)

    program, shape = _compiled(
        body, P(("data", "expert")), P(("data", "expert")), jnp.ones((512, 32))
    )
    kind, each = expected
    assert _sent(program, shape) == {(kind, ("expert",)): 5 * each}, name


def test_a_reduction_over_both_axes_and_one_over_data():
    def body(x):
        return jax.lax.psum(jnp.sin(jax.lax.psum(x, ("data", "expert"))), "data")

    program, shape = _compiled(body, P(("data", "expert")), P(), jnp.ones((512, 32)))
    assert _sent(program, shape) == {
        ("all-reduce", ("data", "expert")): 2 * 8192 * 7 / 8,
        ("all-reduce", ("data",)): 2 * 8192 * 1 / 2,
    }


def test_the_partitioner_gathers_a_sharded_weight_once_per_layer():
    """Plain jit: what the compiler inserts is counted as well."""
    mesh = sharding.make_mesh("fsdp=8")
    put = functools.partial(NamedSharding, mesh)
    layers, width, rows = 6, 64, 1024

    def model(x, w):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, put(P()))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), put(P("fsdp"))), None

        return jax.lax.scan(layer, x, w)[0]

    x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=put(P("fsdp")))
    w = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=put(P(None, "fsdp")))
    program = hlo.parse(jax.jit(model).lower(x, w).compile().as_text())
    each = width // 8 * width * 4
    assert _sent(program, mesh.shape) == {("all-gather", ("fsdp",)): layers * 7 * each}
