"""What differs between the jax versions that the Hopper kernels support (0.10.2 to 0.12).

Pallas' GPU interface is experimental and moves; every version switch of this package is here.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels import backend

if hasattr(plgpu, "InterpretGPUParams"):  # public since 0.11
    from jax.experimental.pallas.mosaic_gpu import (
        InterpretGPUParams as InterpretParams,  # pyrefly: ignore[missing-module-attribute]
    )
else:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as InterpretParams

# The number of multiprocessors of an H100 SXM: what to assume where no device can be asked.
_H100_MULTIPROCESSORS = 132


def is_hopper() -> bool:
    """Whether the default device is a Hopper GPU, on which `wgmma` exists."""
    device = jax.local_devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


def loads_transposed() -> bool:
    """Whether Pallas can load from shared memory transposed."""
    return jax.__version_info__ >= (0, 11)


def device_kind() -> str:
    """What jax calls the default device."""
    return jax.local_devices()[0].device_kind


def multiprocessors() -> int:
    """Multiprocessors of the default device."""
    return jax.local_devices()[0].core_count if is_hopper() else _H100_MULTIPROCESSORS


def compiler_params(**params) -> plgpu.CompilerParams:
    """Arrays are owned by a warpgroup: the default from 0.11 on, to be asked for before."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **params)


def kernel(body, *, interpret: bool, params: Mapping[str, Any] | None = None, **kwargs):
    """`plgpu.kernel`, or its simulation on the CPU with every barrier and buffer kept track of.

    ``params`` are those of the compiler that differ from Pallas' own.
    """
    simulation = None
    if interpret:
        # What TMA reads outside an array is zero; the simulation calls that uninitialized.
        simulation = InterpretParams(
            out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
        )
    compiling = compiler_params(**(params or {}))
    call = plgpu.kernel(body, compiler_params=compiling, interpret=simulation, **kwargs)

    def varying(*operands):
        # Pallas calls its results the same on all devices of a `shard_map`.
        results, tree = jax.tree.flatten(call(*operands))
        results = backend.varying_alike(*results, *operands)[: len(results)]
        return jax.tree.unflatten(tree, results)

    return varying


def use_zero():
    """Use a zero in a register, for nothing: an instruction of no effect and no length.

    It has ptxas see that the accumulator of a product before it starts at zero. LLVM puts all
    zeros of a loop into one register; if its last use is the accumulator, it becomes part of that,
    and ptxas, which then cannot tell that it is a constant, clears 64 registers one by one.
    """

    @plgpu.inline_mgpu()
    def nothing(_):
        i32 = ir.IntegerType.get_signless(32)
        zero = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, 0))
        llvm.inline_asm(None, [zero.result], "// $0", "r", has_side_effects=True)

    nothing()


def load(ref, layout):
    """Load from memory into registers, spread over the threads as ``layout`` says."""
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)  # pyrefly: ignore[missing-argument]
