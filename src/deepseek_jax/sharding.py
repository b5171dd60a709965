"""Meshes, the tables from logical axes to mesh axes, and collectives by logical name.

No other file names a mesh axis. Two modes of one model:

* *per device*: inside ``shard_map`` every array is the device's own part, and the model states
  each collective itself through the functions at the end of this file. Training runs so: what
  crosses the network is what the code says.
* *global*: without a mesh, or under plain ``jit``, the same functions do nothing, and the
  compiler divides the work as it sees fit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.types import UserError

# Slowest network first: what crosses the slice or host boundary is what communicates least.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

# Where activations and computation are divided: logical axis -> mesh axes.
COMPUTE: dict[str, tuple[str, ...]] = {
    # Expert parallelism is carved out of data parallelism, as in V3 section 3.2: every device of
    # the expert axis also holds its own sequences.
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "expert": ("expert",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "expert_mlp": ("tensor",),
    "expert_mlp_in": ("tensor",),
    "vocab": ("tensor",),
}

# Where parameters, gradients and optimizer moments are stored beyond that (ZeRO; Rajbhandari et
# al., 2020): a layer gathers its own when it runs. An axis that does not divide a dimension is
# left out there. ``data`` is in none: it may cross the slow network.
STORED: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp", "context"),
    "heads": ("expert",),
    "mlp": ("expert",),
    "vocab": ("expert",),
    "latent_in": ("fsdp", "context"),
    # Rows and not columns of w2: gradients are divided again without a copy where a part is
    # whole tiles of the TPU's 8 x 128, and 7168 columns over 32 are not.
    "expert_mlp_in": ("fsdp",),
    "latent_out": ("expert",),
}

LOGICAL_AXES = {*COMPUTE, *STORED, "layers", "head_dim", "norm", "accumulate"}

# What may lie beside a matrix "w" in a tree of parameters: the halves "w_lora_a" and "w_lora_b" of
# LoRA, whose product is added where the matrix is used, and, where it is in FP8, the scales of its
# 128x128 blocks, "w_scale".
LORA_A, LORA_B, SCALE = "_lora_a", "_lora_b", "_scale"


# --- meshes ----------------------------------------------------------------------------------


def parse_mesh(text: str) -> dict[str, int]:
    """``"data=2,expert=4"`` -> ``{"data": 2, "expert": 4}``; ``-1`` fills one axis.

    Raises:
        UserError: for an unknown or repeated axis, a size that is not a positive number or
            -1, or more than one -1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES:
            raise UserError(f"unknown mesh axis {axis!r}; the axes are {', '.join(MESH_AXES)}.")
        if axis in sizes:
            raise UserError(f"mesh axis {axis!r} is given twice in {text!r}.")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(f"mesh axis {part!r} needs a whole number, as in {axis}=2.") from None
        if sizes[axis] < 1 and sizes[axis] != -1:
            raise UserError(f"mesh axis {part!r} must be at least 1, or -1 to fill.")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"only one axis of {text!r} can be -1.")
    return sizes


def make_mesh(text: str = "data=-1", devices: list[Any] | None = None) -> Mesh:
    """A mesh over all five axes; those not named have size 1.

    The first axes vary slowest. On several TPU slices they are the ones that cross the data
    center's network; on GPU hosts, devices follow one another host by host.

    Raises:
        UserError: if the sizes do not multiply to the number of devices, several slices cannot be
            divided along the outermost axes, or JAX finds no device.
    """
    devices = _devices() if devices is None else devices
    sizes = parse_mesh(text)
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh {text!r} asks for {math.prod(sizes.values()) or known} devices, but there are "
            f"{len(devices)}; change a size or set one axis to -1."
        )
    return Mesh(_arrange([sizes.get(axis, 1) for axis in MESH_AXES], devices), MESH_AXES)


def _devices() -> list[Any]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for CUDA without its plugin
        asked = jax.config.jax_platforms  # pyrefly: ignore
        reason = next(iter(str(error).splitlines()), "").partition(" (set JAX_")[0].rstrip(".")
        raise UserError(
            f"JAX can use no device{f' of JAX_PLATFORMS={asked}' if asked else ''}"
            f"{f' ({reason})' if reason else ''}; check that it is there and free and that the "
            "extra for it is installed ('.[gpu]', '.[tpu]'), or set JAX_PLATFORMS=cpu."
        ) from error


def _arrange(shape: list[int], devices: list[Any]) -> np.ndarray:
    """Devices in the order that their network likes."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across, left = [], slices
    for size in shape:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        raise UserError(
            f"{slices} slices cannot be divided over the axes {', '.join(MESH_AXES)} = {shape}; "
            f"make data or fsdp a multiple of {slices}."
        )
    within = [size // outer for size, outer in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


# --- what lies beside a matrix ---------------------------------------------------------------


def matrix_axes(names: tuple[str | None, ...]) -> tuple[int, int]:
    """How many of a parameter's axes stack matrices (layers, experts), and where outputs begin.

    Inputs come before outputs, one axis but for ``wo``, which contracts heads and their width.
    """
    lead = sum(name in ("layers", "expert") for name in names)
    return lead, lead + (2 if names[lead] == "heads" else 1)


def beside(names: tuple[str | None, ...], end: str) -> tuple[str | None, ...]:
    """The logical axes of what lies beside a matrix, by the end of its name.

    Halves of an adapter are divided as their matrix is. Blocks are not: its parts need not be
    whole blocks, and scales are a 4,096th of its bytes.
    """
    lead, split = matrix_axes(names)
    if end == LORA_A:
        return (*names[:split], None)
    outputs = names[split:] if end == LORA_B else (None,)
    return (*names[:lead], None, *outputs)


def axes_of(logical_axes: Any, params: Any) -> Any:
    """The logical axes of every leaf: the model's own, and of what lies beside them.

    Raises:
        UserError: for a leaf that is neither.
    """
    if not isinstance(params, dict):
        return logical_axes

    def named(name: str, value: Any) -> Any:
        if name in logical_axes:
            return axes_of(logical_axes[name], value)
        for end in (LORA_A, LORA_B, SCALE):
            if name.endswith(end) and name.removesuffix(end) in logical_axes:
                return beside(logical_axes[name.removesuffix(end)], end)
        raise UserError(f"the model has no parameter {name!r}; do the weights belong to it?")

    return {name: named(name, value) for name, value in params.items()}


# --- placement -------------------------------------------------------------------------------


def spec(*logical: str | None) -> PartitionSpec:
    """The mesh axes of an activation whose axes have these logical names (None: replicated)."""
    return PartitionSpec(*(None if name is None else COMPUTE.get(name) for name in logical))


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    """``spec`` on a mesh."""
    return NamedSharding(mesh, spec(*logical))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in COMPUTE["batch"])


def sequence_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts each row is divided."""
    return math.prod(mesh.shape[axis] for axis in COMPUTE["sequence"])


def _stored(name: str | None, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that gather-on-use divides a dimension of a parameter by."""
    kept, parts = [], math.prod(mesh.shape[axis] for axis in COMPUTE.get(name or "", ()))
    for axis in STORED.get(name or "", ()):
        if size % (parts * mesh.shape[axis]) == 0:
            kept.append(axis)
            parts *= mesh.shape[axis]
    return tuple(kept)


def _placed(
    mesh: Mesh | AbstractMesh,
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
    stored: bool = True,
) -> list[tuple[str, ...]]:
    """The mesh axes of every dimension of a parameter of this global shape."""
    return [
        COMPUTE.get(name or "", ()) + (_stored(name, size, mesh) if stored else ())
        for name, size in zip(names, shape, strict=True)
    ]


def param_spec(
    mesh: Mesh | AbstractMesh,
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
    *,
    stored: bool = True,
) -> PartitionSpec:
    """Where a parameter of this global shape lives; ``stored=False``: divided for compute alone."""
    return PartitionSpec(*(axes or None for axes in _placed(mesh, names, shape, stored)))


def param_specs(
    mesh: Mesh | AbstractMesh, logical_axes: Any, shapes: Any, *, stored: bool = True
) -> Any:
    """``param_spec`` for trees: of logical-axis tuples, and of arrays or their shapes.

    What lies beside a matrix (``axes_of``) needs no axes of its own in the first tree. Without a
    mesh (an empty one) every parameter is whole.

    Raises:
        UserError: if an axis of the mesh does not divide the dimension it must divide.
    """

    def leaf(path: Any, names: tuple[str | None, ...], array: Any) -> PartitionSpec:
        if mesh.empty:
            return PartitionSpec()
        for name, size in zip(names, array.shape, strict=True):
            for axis in COMPUTE.get(name or "", ()):
                if size % mesh.shape[axis]:
                    raise UserError(
                        f"mesh axis {axis}={mesh.shape[axis]} does not divide the "
                        f"{size} of axis {name!r} of parameter {jax.tree_util.keystr(path)}; "
                        f"choose a divisor of {size}."
                    )
        return param_spec(mesh, names, array.shape, stored=stored)

    return jax.tree_util.tree_map_with_path(
        leaf, axes_of(logical_axes, shapes), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def param_shardings(mesh: Mesh, logical_axes: Any, shapes: Any, *, stored: bool = True) -> Any:
    """``param_specs`` as shardings."""
    specs = param_specs(mesh, logical_axes, shapes, stored=stored)
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


# --- per-device computation ------------------------------------------------------------------


def per_device(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``fn`` on every device's own part of its arguments; ``fn`` itself where no mesh is set.

    Replication is not checked (``check_vma=False``: kernels and loops carry no such types), so
    a replicated result must have been made so by ``psum``: every device would otherwise keep
    its own, and nothing would complain.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mesh_axes(*logical: str) -> tuple[str, ...]:
    """The axes of the current mesh, above size 1, that computation is divided by.

    Empty in global mode.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = getattr(mesh, "manual_axes", ())
    names = [axis for name in logical for axis in COMPUTE.get(name, ())]
    return tuple(axis for axis in dict.fromkeys(names) if axis in manual and mesh.shape[axis] > 1)


def parts(*logical: str) -> int:
    """Into how many parts these logical axes are divided here (1 in global mode)."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(*logical))


def part_index(logical: str) -> Any:
    """Which of them this device holds."""
    axes = mesh_axes(logical)
    return jax.lax.axis_index(axes) if axes else 0


def psum(x: Any, *logical: str) -> Any:
    """Sum over the devices that divide these logical axes."""
    axes = mesh_axes(*logical)
    return jax.lax.psum(x, axes) if axes else x


def pmax(x: Any, *logical: str) -> Any:
    """Maximum over the devices that divide these logical axes."""
    axes = mesh_axes(*logical)
    return jax.lax.pmax(x, axes) if axes else x


def pmean(x: Any, *logical: str) -> Any:
    """Mean over the devices that divide these logical axes."""
    return jax.tree.map(lambda a: a / parts(*logical), psum(x, *logical))


def all_gather(x: jax.Array, logical: str, dim: int) -> jax.Array:
    """The whole of dimension ``dim``; its gradient is summed and divided again."""
    axes = mesh_axes(logical)
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def from_next(x: jax.Array, logical: str) -> jax.Array:
    """The next part's ``x``; zeros for the last part."""
    (axis,) = mesh_axes(logical)
    count = parts(logical)
    return jax.lax.ppermute(x, axis, [(i + 1, i) for i in range(count - 1)])


def to_neighbour(x: jax.Array, logical: str) -> jax.Array:
    """The previous part's ``x``, in a ring."""
    (axis,) = mesh_axes(logical)
    count = parts(logical)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % count) for i in range(count)])


# Into how many pieces a message is cut on GPU. XLA's kernel for the devices of one host gives each
# piece of a message one block of 128 threads, up to 64 blocks to a cluster: sent whole, a message
# has one block, which fills a fiftieth of NVLink.
GPU_PIECES: int = 256
# More receivers than that kernel has room for: NCCL sends instead, one call for every piece.
_GPU_KERNEL_RECEIVERS = 8


def ragged_all_to_all(
    rows: jax.Array,
    size: int,
    send_offsets: jax.Array,
    send_sizes: jax.Array,
    there_offsets: jax.Array,
    recv_sizes: jax.Array,
    logical: str,
) -> jax.Array:
    """``jax.lax.ragged_all_to_all`` into a zero buffer of ``size`` rows.

    XLA has none for CPU; there, for tests, everything is gathered and the right rows picked.
    """
    (axis,) = mesh_axes(logical)
    if platform() != "cpu":
        buffer = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
        messages = send_offsets, send_sizes, there_offsets, recv_sizes
        kernel = on_gpu() and parts(logical) <= _GPU_KERNEL_RECEIVERS
        if kernel and jax.process_count() == 1:
            messages = in_pieces(*messages, GPU_PIECES)
        return jax.lax.ragged_all_to_all(rows, buffer, *messages, axis_name=axis)
    every = jax.lax.all_gather(rows, axis)
    column = jax.lax.axis_index(axis)
    first, count, put = (
        jax.lax.all_gather(a, axis)[:, column] for a in (send_offsets, send_sizes, there_offsets)
    )
    at = jnp.arange(size)
    mine = (at[:, None] >= put) & (at[:, None] < put + count)
    sender = jnp.argmax(mine, axis=1)
    picked = every[sender, first[sender] + at - put[sender]]
    return jnp.where(mine.any(1)[:, None], picked, 0)


def exchange_options(mesh: Mesh) -> dict[str, Any]:
    """XLA's options for a program that exchanges tokens among the GPUs of this process.

    Its kernel then writes straight into the others' memory. By default it would go by a copy in
    NCCL's symmetric memory. Measured on four H100s: docs/performance.md.
    """
    where = {(device.platform, device.process_index) for device in mesh.devices.flat}
    divided = math.prod(mesh.shape.get(axis, 1) for axis in COMPUTE["expert"]) > 1
    if not divided or len(where) > 1 or where.pop()[0] != "gpu":
        return {}
    return {
        "xla_gpu_experimental_ragged_all_to_all_use_barrier_with_nccl": False,
        "xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback": True,
    }


def in_pieces(
    send_offsets: jax.Array,
    send_sizes: jax.Array,
    there_offsets: jax.Array,
    recv_sizes: jax.Array,
    pieces: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Every message as ``pieces`` of equal size; the last ones may be shorter, or empty.

    Sender and receiver cut alike, since they agree on the size. The pieces of one message follow
    one another, as ``jax.lax.ragged_all_to_all`` wants them.
    """

    def cut(sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = -(-sizes // pieces)[:, None]
        starts = jnp.arange(pieces, dtype=sizes.dtype) * each
        return starts, jnp.clip(sizes[:, None] - starts, 0, each)

    starts, sizes = cut(send_sizes)
    # An empty piece starts where the message ends, within the buffers.
    starts = jnp.minimum(starts, send_sizes[:, None])
    return (
        (send_offsets[:, None] + starts).reshape(-1),
        sizes.reshape(-1),
        (there_offsets[:, None] + starts).reshape(-1),
        cut(recv_sizes)[1].reshape(-1),
    )


def platform() -> str:
    """What the program is compiled for: the devices of the mesh, wherever that happens."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.platform if device else jax.default_backend()


def on_gpu() -> bool:
    """Whether that is a GPU."""
    return platform() in ("gpu", "cuda")


def replicas() -> int:
    """Devices that each compute the loss: gradients are seeded with its inverse on each."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in getattr(mesh, "manual_axes", ()))


def sum_gradients(grads: Any, specs: Any) -> Any:
    """Sum gradients over the axes that their parameters are replicated over."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = getattr(mesh, "manual_axes", ())

    def leaf(spec: PartitionSpec, grad: jax.Array) -> jax.Array:
        own = set(jax.tree.leaves(tuple(spec)))
        axes = tuple(a for a in MESH_AXES if a in manual and a not in own and mesh.shape[a] > 1)
        return jax.lax.psum(grad, axes) if axes else grad

    return jax.tree.map(leaf, specs, grads, is_leaf=lambda x: isinstance(x, PartitionSpec))


def local_shapes(
    names: tuple[str | None, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A parameter's shape on this device: as stored in training, and as computation wants it."""
    mesh = jax.sharding.get_abstract_mesh()
    if not getattr(mesh, "manual_axes", ()):
        return shape, shape

    def part(stored: bool) -> tuple[int, ...]:
        placed = _placed(mesh, names, shape, stored)
        return tuple(
            size // math.prod(mesh.shape[axis] for axis in axes)
            for size, axes in zip(shape, placed, strict=True)
        )

    return part(True), part(False)


def gathered(
    x: jax.Array, names: tuple[str | None, ...], shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """A parameter as computation wants it: cast, and whole along the axes it is only stored by.

    Cast first, so that the narrow type travels. Its gradient is widened first, so that the sum
    over devices is made in the parameter's own type.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if x.shape == local_shapes(names, shape)[1]:
        return x.astype(dtype)
    stored = tuple(
        tuple(a for a in _stored(name, size, mesh) if mesh.shape[a] > 1)
        for name, size in zip(names, shape, strict=True)
    )
    return _gathered(x, stored, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: jax.Array, stored: tuple[tuple[str, ...], ...], dtype: Any) -> jax.Array:
    x = x.astype(dtype)
    for dim, axes in enumerate(stored):
        if axes:
            x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def _gathered_fwd(x, stored, dtype):
    return _gathered(x, stored, dtype), jnp.zeros((), x.dtype)


def _gathered_bwd(stored, dtype, like, ct):
    ct = ct.astype(like.dtype)
    for dim, axes in reversed(list(enumerate(stored))):
        if axes:
            ct = jax.lax.psum_scatter(ct, axes, scatter_dimension=dim, tiled=True)
    return (ct,)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)
