"""The training state as trees on disk: what is stored, whether it fits, reading it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from deepseek_jax.sharding import SCALE
from deepseek_jax.types import TrainState, UserError


def items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two trees on disk. The optimizer's is flat: its NamedTuples are Optax's business."""
    optimizer = {"step": state.step, **flatten(state.opt_state, "opt_state")}
    return {"params": state.params, "router_bias": state.router_bias_LE}, optimizer


def flatten(tree: object, prefix: str = "") -> dict[str, Any]:
    """The leaves by their path: ``{"prefix/0/mu/embed": leaf}``."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {
        f"{prefix}/{name(path, simple=True, separator='/')}".strip("/"): leaf
        for path, leaf in paths
    }


def reader() -> Any:
    """Orbax's reader of trees; Any, since it declares its own class of paths but takes every."""
    return ocp.PyTreeCheckpointHandler()


def stored_tree(folder: Path) -> dict[str, Any]:
    """The abstract tree of a stored item, every leaf on the first device."""
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree = reader().metadata(folder).tree
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one_device), tree
    )


def check_fits(folder: Path, wanted: dict[str, Any], *, same_dtype: bool) -> None:
    """Raises a UserError that names the first leaf in which an item differs from a tree."""
    stored, expected = flatten(stored_tree(folder)), flatten(wanted)
    for name in list(expected) + [name for name in stored if name not in expected]:
        if name.endswith(SCALE) and (name in stored) != (name in expected):
            raise UserError(_only_one_in_fp8(folder, name, name in stored))
        old, new = (_describe(tree.get(name), same_dtype) for tree in (stored, expected))
        if old != new:
            raise UserError(
                f"the checkpoint {folder.parent} does not fit this configuration: {name} is {old} "
                f"in the checkpoint and {new} here; use the configuration it was saved with "
                "(vocabulary, layers, widths, optimizer), or start anew in another directory."
            )


def _only_one_in_fp8(folder: Path, name: str, stored: bool) -> str:
    if stored:
        return (
            f"the checkpoint {folder.parent} has its weights in FP8 ({name}); keep them so with "
            "--weights fp8, or as an adapter's base with --lora-base fp8, or convert the original "
            "to bfloat16."
        )
    return (
        f"the checkpoint {folder.parent} holds no FP8 weights to keep ({name} is absent); use it "
        "as it is, or `convert` it to a folder with --dtype fp8."
    )


def _describe(leaf: Any, with_dtype: bool) -> str:
    if leaf is None:
        return "absent"
    return f"{jnp.dtype(leaf.dtype).name if with_dtype else ''}{list(leaf.shape)}"


def restore_tree(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads an item; leaves go to the shardings of the abstract tree, else to one device."""
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> ocp.ArrayRestoreArgs:
        sharding = getattr(leaf, "sharding", None) or one_device
        return ocp.ArrayRestoreArgs(sharding=sharding, dtype=leaf.dtype, global_shape=leaf.shape)

    args = ocp.args.PyTreeRestore(item=abstract, restore_args=jax.tree.map(place, abstract))
    return reader().restore(folder, args=args)
