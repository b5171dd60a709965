"""FLOPs and HBM bytes, by hand and against XLA's own count where it has no loop to miss."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.plan import hlo, work


def _program(body: str, more: str = "") -> hlo.Program:
    return hlo.parse(f"HloModule m\n{more}\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


def _only(program: hlo.Program, opcode: str) -> tuple[hlo.Instruction, hlo.Computation]:
    main = program.computations[program.entry]
    (found,) = [i for i in main.instructions.values() if i.opcode == opcode]
    return found, main


# As XLA's TPU compiler writes dots; the expected counts are 2 x batch x rows x columns x inner.
@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "expected"),
    [
        ("bf16[8,64]", "bf16[64,32]", "f32[8,32]", "dim_labels=bf_io->bf", 2 * 8 * 64 * 32),
        (
            "bf16[16,1024,48]",  # batched: one matrix per batch entry
            "bf16[16,1024,80]",
            "f32[16,48,80]",
            "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0fb_0io->0bf",
            2 * 16 * 48 * 80 * 1024,
        ),
        (
            "bf16[4096,1536,1]",  # a head axis that the left side has not
            "bf16[1536,128,192]",
            "f32[4096,128,192]",
            "window={size=192 pad=191_191 rhs_reversal=1}, dim_labels=bf0_io0->bf0",
            2 * 4096 * 1536 * 128 * 192,
        ),
        (
            "bf16[4096,128,128]",  # two contracted axes, one as features and one as the window
            "bf16[128,128,7168]",
            "f32[4096,7168,1]",
            "window={size=128}, dim_labels=b0f_0io->bf0",
            2 * 4096 * 7168 * 128 * 128,
        ),
        (
            "f32[1,5,5,3]",  # a convolution proper: 3x3, padded, 3 to 7 channels
            "f32[3,3,3,7]",
            "f32[1,5,5,7]",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 3 * 7 * (5 * 3 - 2) ** 2,
        ),
    ],
)
def test_products_written_as_convolutions(lhs, rhs, out, attributes, expected):
    program = _program(
        f"  %a = {lhs} parameter(0)\n  %b = {rhs} parameter(1)\n"
        f"  ROOT %c = {out} convolution(%a, %b), {attributes}"
    )
    assert work.product_flops(*_only(program, "convolution")) == expected
    assert work.count(program).flops == expected


@pytest.mark.parametrize(
    ("equation", "a", "b", "expected"),
    [
        ("btd,dnh->btnh", (2, 16, 8), (8, 3, 5), 2 * 2 * 16 * 8 * 3 * 5),
        ("btnh,bsnh->bnts", (2, 16, 3, 8), (2, 7, 3, 8), 2 * 2 * 3 * 16 * 7 * 8),
    ],
)
def test_dots_agree_with_xla(equation, a, b, expected):
    compiled = (
        jax.jit(lambda x, y: jnp.einsum(equation, x, y)).lower(jnp.ones(a), jnp.ones(b)).compile()
    )
    assert work.count(hlo.parse(compiled.as_text())).flops == expected


def test_a_loop_counts_by_its_trips_where_xla_counts_it_once():
    def model(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    compiled = jax.jit(model).lower(jnp.ones((32, 64)), jnp.ones((10, 64, 64))).compile()
    once = 2 * 32 * 64 * 64
    assert work.count(hlo.parse(compiled.as_text())).flops == 10 * once
    assert compiled.cost_analysis()["flops"] < 2 * once  # why we count ourselves


_RAGGED = """
  %sizes = s32[4]{0} parameter(0)
  %x = bf16[1024,256]{1,0} parameter(1)
  %w = bf16[4,256,128]{2,1,0} parameter(2)
  ROOT %r = f32[1024,128]{1,0} custom-call(%sizes, %x, %w), custom_call_target="tpu_custom_call", \
frontend_attributes={ragged_dot_tiling="128,256,128"}"""


def test_grouped_products_count_the_rows_that_are_there():
    program = _program(_RAGGED)
    assert work.count(program).ragged_flops == 2 * 1024 * 256 * 128
    assert work.count(program, pairs=600).ragged_flops == 2 * 600 * 256 * 128
    assert work.count(program).flops == 0


_KERNELS = """
  %sizes = s32[4]{0} parameter(0)
  %x = bf16[1024,256]{1,0} parameter(1)
  %dy = bf16[1024,128]{1,0} parameter(2)
  %w = bf16[4,256,128]{2,1,0} parameter(3)
  %s2 = s32[4]{0} custom-call(%sizes), custom_call_target="AssumeGatherIndicesInBound", \
metadata={op_name="jit(f)/jit(gmm)/jit(_take)/gather"}
  %y = bf16[1024,128]{1,0} custom-call(%s2, %x, %w), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/jit(gmm)/pallas_call"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"67108864","transcendentals":"0"}}}
  %dw = bf16[4,256,128]{2,1,0} custom-call(%sizes, %x, %dy), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jit(tgmm)/pallas_call"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"67108864","transcendentals":"0"}}}
  ROOT %a = bf16[1024,128]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/attention"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"0"}}}"""


def test_kernels_count_as_they_say_and_grouped_ones_by_their_rows():
    program = _program(_KERNELS)
    assert work.count(program).flops == 1000
    assert work.count(program).ragged_flops == 2 * (2 * 1024 * 256 * 128)
    assert work.count(program, pairs=600).ragged_flops == 2 * (2 * 600 * 256 * 128)


def test_kernels_move_what_they_say_and_not_the_stack_that_they_read_a_layer_of():
    def moved(said: int) -> float:
        estimate = f'{{"flops":"1","transcendentals":"0","bytes_accessed":"{said}"}}'
        program = _program(
            "  %cache = bf16[61,16,64]{2,1,0} parameter(0)\n"
            "  ROOT %y = bf16[16,64]{1,0} custom-call(%cache), "
            'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/mla_decode"}, '
            f'backend_config={{"custom_call_config":{{"cost_estimate":{estimate}}}}}'
        )
        return work.count(program).hbm_bytes

    layer = 16 * 64 * 2
    assert moved(2 * layer) == 2 * layer
    assert moved(1000 * layer) == 62 * layer  # some kernels count what they read twice


_SLICES = """
%slice_fusion (p.0: f32[58,64,64], p.1: s32[], p.2: f32[32,64]) -> f32[32,64] {
  %p.0 = f32[58,64,64]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[32,64]{1,0} parameter(2)
  %z = s32[] constant(0)
  %d = f32[1,64,64]{2,1,0} dynamic-slice(%p.0, %p.1, %z, %z), dynamic_slice_sizes={1,64,64}
  %m = f32[64,64]{1,0} bitcast(%d)
  ROOT %o = f32[32,64]{1,0} dot(%p.2, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%outer_fusion (r.0: f32[58,64,64], r.1: s32[], r.2: f32[32,64]) -> f32[32,64] {
  %r.0 = f32[58,64,64]{2,1,0} parameter(0)
  %r.1 = s32[] parameter(1)
  %r.2 = f32[32,64]{1,0} parameter(2)
  ROOT %nested = f32[32,64]{1,0} fusion(%r.0, %r.1, %r.2), kind=kLoop, calls=%slice_fusion
}

%update_fusion (q.0: f32[58,32,64], q.1: s32[], q.2: f32[32,64]) -> f32[58,32,64] {
  %q.0 = f32[58,32,64]{2,1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %q.2 = f32[32,64]{1,0} parameter(2)
  %zz = s32[] constant(0)
  %n = f32[1,32,64]{2,1,0} bitcast(%q.2)
  ROOT %u = f32[58,32,64]{2,1,0} dynamic-update-slice(%q.0, %n, %q.1, %zz, %zz)
}
"""


@pytest.mark.parametrize("fusion", ["slice_fusion", "outer_fusion"])
def test_hbm_traffic_takes_slices_of_stacked_parameters_and_not_the_stack(fusion):
    """One layer's matrix is read and one layer's activations are written, not 58."""
    program = _program(
        "  %w = f32[58,64,64]{2,1,0} parameter(0)\n"
        "  %i = s32[]{:S(2)} parameter(1)\n"
        "  %x = f32[32,64]{1,0} parameter(2)\n"
        "  %saved = f32[58,32,64]{2,1,0} parameter(3)\n"
        f"  %y = f32[32,64]{{1,0}} fusion(%w, %i, %x), kind=kOutput, calls=%{fusion}\n"
        "  ROOT %s = f32[58,32,64]{2,1,0} fusion(%saved, %i, %y), kind=kLoop, calls=%update_fusion",
        _SLICES,
    )
    matrix, rows = 64 * 64 * 4, 32 * 64 * 4
    assert work.count(program).hbm_bytes == (matrix + rows + rows) + (rows + rows)
    assert work.count(program).flops == 2 * 32 * 64 * 64  # inside the fusion


_SCATTER = """
%scatter_fusion (p.0: f32[58,32,64], p.1: s32[4,2], p.2: f32[4,64]) -> f32[58,32,64] {
  %p.0 = f32[58,32,64]{2,1,0} parameter(0)
  %p.1 = s32[4,2]{1,0} parameter(1)
  %p.2 = f32[4,64]{1,0} parameter(2)
  ROOT %u = f32[58,32,64]{2,1,0} scatter(%p.0, %p.1, %p.2), to_apply=%set
}
"""


@pytest.mark.parametrize(
    "scatter", ["scatter(%c, %i, %x), to_apply=%set", "fusion(%c, %i, %x), calls=%scatter_fusion"]
)
def test_hbm_traffic_takes_the_rows_that_are_scattered_and_not_the_cache(scatter):
    program = _program(
        "  %c = f32[58,32,64]{2,1,0} parameter(0)\n"
        "  %i = s32[4,2]{1,0} parameter(1)\n"
        "  %x = f32[4,64]{1,0} parameter(2)\n"
        f"  ROOT %s = f32[58,32,64]{{2,1,0}} {scatter}",
        _SCATTER,
    )
    indices, rows = 4 * 2 * 4, 4 * 64 * 4
    assert work.count(program).hbm_bytes == indices + 2 * rows


def test_what_lies_in_vmem_is_no_hbm_traffic():
    program = _program(
        "  %a = f32[64,64]{1,0} parameter(0)\n"
        "  %b = f32[64,64]{1,0:T(8,128)S(1)} copy(%a)\n"
        "  ROOT %c = f32[64,64]{1,0:T(8,128)S(1)} tanh(%b)"
    )
    assert work.count(program).hbm_bytes == 64 * 64 * 4
