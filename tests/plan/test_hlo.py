"""Reading optimized HLO: shapes, the call graph, how often a loop runs."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.plan import hlo
from tests.plan.programs import LOOPS


def test_shapes_with_layouts_tuples_and_narrow_types():
    bf16, f8, u4 = hlo.parse_shapes(
        "(bf16[8,1024]{1,0:T(8,128)(2,1)}, /*index=1*/f8e4m3fn[3,5]{1,0:T(8,128)S(1)}, u4[7])"
    )
    assert (bf16.dtype, bf16.dims, bf16.bytes, bf16.in_hbm) == ("bf16", (8, 1024), 16384, True)
    assert (f8.dims, f8.bytes, f8.in_hbm) == ((3, 5), 15, False)
    assert u4.bytes == 4
    assert hlo.parse_shapes("pred[]")[0].bytes == 1
    assert hlo.parse_shapes("token[]")[0].bytes == 0


def test_instructions_are_taken_apart():
    program = hlo.parse(LOOPS)
    dot = program.computations["inner"].instructions["dot.1"]
    assert dot.opcode == "dot"
    assert dot.operands == ("a", "b")
    assert dot.shapes[0].dims == (4, 16)
    assert "lhs_contracting_dims={1}" in dot.attributes
    assert program.entry == "main"
    assert program.computations["main"].root.name == "out"


def test_nested_loops_multiply_whichever_way_their_trips_are_written():
    runs = hlo.parse(LOOPS).executions
    assert runs["outer_body"] == 5  # constant in the condition: 0 up to 5
    assert runs["inner"] == 5 * 7  # known_trip_count of the inner loop
    assert runs["shared"] == 5 * 7 + 1  # called from the inner body and from main
    assert runs["wide_body"] == 9 - 2  # limit and start both in the loop's state
    assert runs["wrapped_body"] == 4  # comparison inside a fusion


def test_a_loop_whose_trips_depend_on_data_is_named_and_counted_as_asked():
    program = hlo.parse(LOOPS)
    assert program.open_loops == ("while.data",)
    assert program.executions["data_body"] == 0
    assert hlo.parse(LOOPS, {"other": 3}).executions["data_body"] == 0
    assert hlo.parse(LOOPS, {"some_scope": 3}).executions["data_body"] == 3


def test_applied_scalar_computations_are_not_calls():
    assert hlo.parse(LOOPS).executions["add"] == 0


@pytest.mark.parametrize("trips", [3, 11])
def test_a_compiled_scan(trips):
    def body(carry, x):
        return jnp.tanh(carry @ x), None

    compiled = (
        jax.jit(lambda c, xs: jax.lax.scan(body, c, xs)[0])
        .lower(jnp.ones((8, 8)), jnp.ones((trips, 8, 8)))
        .compile()
    )
    program = hlo.parse(compiled.as_text())
    assert program.entry
    assert max(program.executions.values()) == trips
    assert not program.open_loops
