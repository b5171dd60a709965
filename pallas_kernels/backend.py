"""Which kernels the default device can run, and what `shard_map` wants of all of them."""

import functools
import logging
from typing import Any, Literal

import jax

_log = logging.getLogger(__name__)

Impl = Literal["auto", "hopper", "tpu", "reference"]


def platform() -> str:
    """What is compiled for: the devices of the mesh that is set, else the default device.

    They differ when a program is compiled ahead of time, for a machine that is not there.
    """
    device = _device()
    return device if isinstance(device, str) else device.platform


def device_kind() -> str:
    """What jax calls the devices that are compiled for."""
    device = _device()
    return jax.devices(device)[0].device_kind if isinstance(device, str) else device.device_kind


def _device() -> Any:
    """A device, a mesh's abstract one, or the name of a platform."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    default = jax.config.jax_default_device  # pyrefly: ignore[missing-attribute]
    return device or default or jax.default_backend()


def on_hopper() -> bool:
    """Whether the default device is a Hopper GPU; imports Pallas' GPU half only on a GPU."""
    if platform() not in ("gpu", "cuda") or jax.default_backend() != "gpu":
        return False
    from pallas_kernels.hopper import compat

    return compat.is_hopper()


def check_impl(operation: str, impl: str, allowed: tuple[str, ...]) -> None:
    """Refuse an implementation that an operation does not have.

    Raises:
        ValueError: unless it is one of those allowed.
    """
    if impl not in allowed:
        raise ValueError(f"{operation} has no implementation {impl!r}: give one of {allowed}")


def say_once(operation: str, impl: str) -> None:
    """Log what ``impl="auto"`` came to, the first time that it comes to it.

    On an accelerator it is a warning that no kernel takes the operands.
    """
    _say_once(operation, impl, platform(), device_kind())


@functools.cache
def _say_once(operation: str, impl: str, on: str, kind: str) -> None:
    slow = impl in ("reference", "blocked") and on != "cpu"
    remedy = "; no kernel takes these shapes or dtypes, see its docstring" if slow else ""
    level = logging.WARNING if slow else logging.INFO
    _log.log(level, "%s runs as %r on %s%s", operation, impl, kind, remedy)


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
