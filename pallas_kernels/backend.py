"""Which kernels the default device can run, and what `shard_map` wants of all of them."""

import functools
import logging
from typing import Any

import jax

_log = logging.getLogger(__name__)


def platform() -> str:
    """What is compiled for: the devices of the mesh that is set, else the default backend.

    They differ when a program is compiled ahead of time, for a machine that is not there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.platform if device else jax.default_backend()


def on_hopper() -> bool:
    """Whether the default device is a Hopper GPU; imports Pallas' GPU half only on a GPU."""
    if platform() not in ("gpu", "cuda") or jax.default_backend() != "gpu":
        return False
    from pallas_kernels.hopper import compat

    return compat.is_hopper()


@functools.cache
def say_once(operation: str, impl: str) -> None:
    """Log what ``impl="auto"`` came to, the first time that it comes to it."""
    _log.info("%s runs as %r on %s", operation, impl, jax.devices()[0].device_kind)


def varying_alike(*arrays: Any) -> tuple[Any, ...]:
    """The same arrays, or trees of them, all varying over the axes that any of them varies over.

    Of `shard_map`'s, that is. With ``check_vma``, loops and `custom_vjp` want this said; the
    gradient of what was the same on all devices is then summed over them, by the transpose of
    `pcast`.
    """

    def axes(array):
        kind = getattr(jax.typeof(array), "manual_axis_type", None)
        return kind.varying if kind is not None else frozenset()

    union = frozenset().union(*map(axes, jax.tree.leaves(arrays)))

    def vary(array):
        missing = tuple(sorted(union - axes(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(vary, arrays)
