"""LoRA (Hu et al., 2021): W + (alpha / r) A B with W frozen, for any of the model's matrices.

The adapter is a tree of its own: where the parameters have ``wo`` it has ``wo_lora_a`` and
``wo_lora_b``. In training the two trees are laid into one another, and a layer adds the product to
its matrix where it uses it (``model/layers.py``), under the scan over layers: what exists at a time
is one layer's product, never a second model; a base kept in FP8 is multiplied out there too. The
backward pass makes one layer's dW and projects
it, so a step costs the FLOPs of full fine-tuning; gradients, moments and checkpoints are the
adapter's alone.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from deepseek_jax import sharding
from deepseek_jax.config import RematPolicy
from deepseek_jax.model.layers import low_rank
from deepseek_jax.model.transformer import DeepSeekV3, abstract_params, logical_axes
from deepseek_jax.sharding import LORA_A, LORA_B
from deepseek_jax.train.run import Trainee
from deepseek_jax.types import Params, UserError

Target = Literal["attention", "ffn", "experts"]
_MATRICES: dict[Target, tuple[tuple[str, str], ...]] = {
    "attention": tuple(("attn", w) for w in ("wq", "wq_a", "wq_b", "wkv_a", "wkv_b", "wo")),
    "ffn": tuple((ffn, w) for ffn in ("ffn", "shared_experts") for w in ("w1", "w2", "w3")),
    "experts": tuple(("moe", w) for w in ("w1", "w2", "w3")),
}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of the parameters themselves."""

    lora_rank: int = 0
    """r; 0: no LoRA, every parameter is trained."""
    lora_alpha: float = 32.0
    """The product is scaled by alpha / r."""
    lora_targets: tuple[Target, ...] = ("attention", "ffn", "experts")
    """MLA's projections; dense and shared feed-forward networks; routed experts."""
    lora_base: Literal["params", "fp8"] = "params"
    """The frozen base in the format of the parameters, or in FP8, as ``init`` has it."""

    def __post_init__(self) -> None:
        """Refuse what adapts nothing."""
        if self.lora_rank < 0 or not self.lora_targets or self.lora_alpha <= 0:
            raise UserError("LoRA wants a rank of at least 0, alpha above 0, and targets.")
        if self.lora_base == "fp8" and not self.lora_rank:
            raise UserError("weights in FP8 are not trained; give an adapter's --lora-rank too.")

    def check(self, remat: RematPolicy) -> None:
        """Refuse what would undo the saving.

        Raises:
            UserError: for a backward pass that keeps what it multiplied out of FP8.
        """
        if self.lora_base == "fp8" and remat == "none":
            raise UserError(
                "with remat=none the backward pass keeps every matrix of a base in FP8 as it was "
                "multiplied out; choose --remat selective or full."
            )

    @property
    def scale(self) -> float:
        """Alpha / r."""
        return self.lora_alpha / self.lora_rank


def adapters(model: DeepSeekV3, config: LoraConfig) -> tuple[Params, Params]:
    """Shapes and logical axes of the adapter, in trees like the parameters'."""
    wanted = {pair for target in config.lora_targets for pair in _MATRICES[target]}

    def walk(shapes: Any, axes: Any, parent: str) -> tuple[Params, Params]:
        found: tuple[Params, Params] = ({}, {})
        for name, value in shapes.items():
            if isinstance(value, dict):
                for tree, inner in zip(found, walk(value, axes[name], name), strict=True):
                    if inner:
                        tree[name] = inner
            elif (parent, name) in wanted:
                lead, split = sharding.matrix_axes(axes[name])
                halves = {
                    LORA_A: (*value.shape[:split], config.lora_rank),
                    LORA_B: (*value.shape[:lead], config.lora_rank, *value.shape[split:]),
                }
                for end, shape in halves.items():
                    found[0][name + end] = jax.ShapeDtypeStruct(shape, jnp.float32)
                    found[1][name + end] = sharding.beside(axes[name], end)
        return found

    return walk(abstract_params(model), logical_axes(model), "")


def init_adapter(model: DeepSeekV3, config: LoraConfig, key: PRNGKeyArray) -> Params:
    """A from N(0, 1 / inputs), B zero: at first nothing is changed."""
    shapes, axes = adapters(model, config)
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))

    def draw(index: int, path: Any, shape: jax.ShapeDtypeStruct, own: Any) -> jax.Array:
        if path[-1].key.endswith(LORA_B):
            return jnp.zeros(shape.shape, shape.dtype)
        lead = sum(axis in ("layers", "expert") for axis in own)
        std = math.prod(shape.shape[lead:-1]) ** -0.5
        return std * jax.random.normal(jax.random.fold_in(key, index), shape.shape)

    drawn = [
        draw(index, path, leaf, own)
        for index, ((path, leaf), own) in enumerate(zip(leaves, names, strict=True))
    ]
    return jax.tree.unflatten(treedef, drawn)


def attach(base: Params, adapter: Params, scale: float) -> Params:
    """Both trees in one, as the model takes them; nothing of the base is computed or copied."""
    both = dict(base)
    for name, value in adapter.items():
        if isinstance(value, dict):
            both[name] = attach(base[name], value, scale)
        else:
            both[name] = value * scale if name.endswith(LORA_B) else value
    return both


def merge(base: Params, adapter: Params, scale: float) -> Params:
    """Plain parameters: W + scale A B, in the base's dtype."""
    merged = {}
    for name, value in base.items():
        if isinstance(value, dict):
            merged[name] = merge(value, adapter.get(name, {}), scale)
        elif name + LORA_A in adapter:
            a, b = adapter[name + LORA_A], adapter[name + LORA_B]
            product = low_rank(a, scale * b, value.ndim)
            merged[name] = (value.astype(jnp.float32) + product).astype(value.dtype)
        else:
            merged[name] = value
    return merged


def adapter_of(model: DeepSeekV3, config: LoraConfig, base: Params, mesh: Mesh) -> Trainee:
    """The adapter is trained; the base, wherever it lies (or is only described), stays.

    A base in FP8 is never merged, since FP8 would round the product away: what is generated with
    is both, as in training.
    """
    shapes, axes = adapters(model, config)
    if not shapes:
        raise UserError(
            f"the model has none of the matrices that LoRA targets: {config.lora_targets}."
        )
    where = sharding.param_shardings(mesh, axes, shapes)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )

    def whole(adapter: Params, base: Params, **_: Any) -> Params:
        return attach(base, adapter, config.scale)

    def merged(adapter: Params, base: Params, **_: Any) -> Params:
        in_fp8 = any(x.dtype == jnp.float8_e4m3fn for x in jax.tree.leaves(base))
        return (attach if in_fp8 else merge)(base, adapter, config.scale)

    frozen_axes = {"base": logical_axes(model)}
    return Trainee(model, {"base": base}, axes, frozen_axes, abstract, whole, merged)


def place_adapter(model: DeepSeekV3, config: LoraConfig, where: Params, seed: int) -> Params:
    """``init_adapter``, made where it belongs."""
    init = functools.partial(init_adapter, model, config)
    return jax.jit(init, out_shardings=where)(jax.random.key(seed))
