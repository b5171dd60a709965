"""What a model *is*: the frozen ``ModelConfig``, and the number policy.

Field names are those of Hugging Face's ``config.json``, so that a checkpoint's file is read
directly. Nothing here says how a model is run: meshes are in ``sharding.py``, optimization in
``train/``.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from deepseek_jax.types import UserError

# The released code builds the two latent norms (q_a_layernorm, kv_a_layernorm) with RMSNorm's
# default epsilon whatever rms_norm_eps says; it matters for Moonlight (rms_norm_eps = 1e-5).
LATENT_NORM_EPS = 1e-6

# "selective" is the V3 report's recipe (section 3.2.3), see model/transformer.py.
RematPolicy = Literal["none", "full", "selective"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """The one place that says which number format is used where.

    RMSNorm, the router, softmax, the losses and RoPE's angles are float32 whatever this says
    (V3 section 3.3.1 keeps them in high precision).
    """

    params: Dtype = "float32"
    """Master weights."""
    compute: Dtype = "bfloat16"
    """Operands of matmuls, and activations between them."""
    matmuls: Literal["compute", "fp8"] = "compute"
    """fp8: products of MLA's projections, feed-forward networks and experts, with both their
    gradients, in block-scaled E4M3 (V3 section 3.3). The embedding, the head, the router, norms
    and attention itself stay as they are; so do decoding's absorbed projections."""
    accumulate: Dtype = "float32"
    """Partial sums inside matmuls."""
    logits: Dtype = "float32"
    """Output of the head, and what cross-entropy is computed in."""

    @property
    def param_dtype(self) -> Any:
        """Jax dtype of ``params``."""
        return jnp.dtype(self.params)

    @property
    def compute_dtype(self) -> Any:
        """Jax dtype of ``compute``."""
        return jnp.dtype(self.compute)


FLOAT32 = Precision(params="float32", compute="float32")


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al., 2023; V3 section 4.3). Names as in ``rope_scaling``."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a DeepSeek-V2/V3-family model; names as in ``config.json``.

    Raises:
        UserError: where two fields contradict one another, naming both and the remedy.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    """The first k layers have a dense FFN, the rest DeepSeekMoE."""
    num_attention_heads: int
    q_lora_rank: int | None
    """Latent width of queries (V3 Eq. 6); None: queries come straight from the hidden state."""
    kv_lora_rank: int
    """Latent width of keys and values (V3 Eq. 1)."""
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    """Each token may reach at most ``topk_group`` of ``n_group`` groups (V3 section 2.1.2)."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 1e-4
    """Weight of the complementary balance loss: V3 Eq. 17, or V2's expert-level loss."""
    seq_aux: bool = True
    """The balance loss is taken within each sequence (True) or over the micro-batch."""
    device_loss_alpha: float = 0.0
    """V2's device-level balance loss (V2 section 2.2.3), the groups being the devices."""
    communication_loss_alpha: float = 0.0
    """V2's communication balance loss (V2 section 2.2.3)."""
    num_nextn_predict_layers: int = 0
    """Depth D of multi-token prediction (V3 section 2.2)."""
    rope_theta: float = 10_000.0
    rope_scaling: Yarn | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    """Std of the initial weights: 0.006 in both reports; released files say 0.02, unused there."""
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self) -> None:
        """Refuse contradictions while they are still one sentence away from their cause."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        E, G, K = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        checks = [
            (
                not 0 <= self.first_k_dense_replace <= self.num_hidden_layers,
                f"first_k_dense_replace={self.first_k_dense_replace} must lie between 0 and "
                f"num_hidden_layers={self.num_hidden_layers}.",
            ),
            (
                self.q_lora_rank is not None and self.q_lora_rank < 1,
                f"q_lora_rank={self.q_lora_rank} must be positive, or None for direct queries.",
            ),
            (
                self.qk_rope_head_dim % 2 != 0,
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs.",
            ),
            (
                self.n_shared_experts < 0 or self.num_nextn_predict_layers < 0,
                "n_shared_experts and num_nextn_predict_layers must not be negative.",
            ),
            (K > E, f"num_experts_per_tok={K} exceeds n_routed_experts={E}."),
            (E % G != 0, f"n_group={G} must divide n_routed_experts={E}."),
            (
                not 1 <= self.topk_group <= G,
                f"topk_group={self.topk_group} must lie between 1 and n_group={G}.",
            ),
            (
                self.topk_group * (E // G) < K,
                f"topk_group={self.topk_group} groups of {E // G} experts cannot supply "
                f"num_experts_per_tok={K}; raise topk_group.",
            ),
            (
                self.topk_method == "greedy" and G != 1,
                f"topk_method='greedy' ignores groups: set n_group=1 (it is {G}) or use "
                "'group_limited_greedy'.",
            ),
            (
                self.topk_method == "noaux_tc" and G > 1 and E // G < 2,
                f"noaux_tc scores a group by its two best experts, but n_group={G} leaves "
                f"{E // G} per group.",
            ),
            (
                self.topk_method == "noaux_tc" and self.scoring_func != "sigmoid",
                "topk_method='noaux_tc' (V3) goes with scoring_func='sigmoid'.",
            ),
            (
                self.topk_method != "noaux_tc" and self.scoring_func != "softmax",
                f"topk_method='{self.topk_method}' (V2) goes with scoring_func='softmax'.",
            ),
            (
                self.num_nextn_predict_layers > 0 and self.num_moe_layers == 0,
                "multi-token prediction modules are MoE blocks: num_nextn_predict_layers > 0 needs "
                "first_k_dense_replace < num_hidden_layers.",
            ),
        ]
        for failed, message in checks:
            if failed:
                raise UserError(message)

    @property
    def num_moe_layers(self) -> int:
        """Layers of the main model with DeepSeekMoE."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def num_routers(self) -> int:
        """Rows of ``router_bias_LE``: the MoE layers, then the MTP modules."""
        return self.num_moe_layers + self.num_nextn_predict_layers

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: un-rotated plus rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(d) of V3 Eq. 10, times YaRN's temperature m^2 where context is extended."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any]) -> "ModelConfig":
        """Read a Hugging Face ``config.json`` (a path to it, or its contents).

        Raises:
            UserError: if the file is not of the DeepSeek-V2/V3 family or asks for something
                that no released model of the family uses.
        """
        return _from_hf(cls, _read_json(source) if not isinstance(source, dict) else source)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` that transformers and serving engines read; inverse of from_hf."""
        return _to_hf(self)


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "max_position_embeddings",
)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, m = 0.1 * mscale * ln(factor) + 1 (1 below factor 1)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


# --- config.json -----------------------------------------------------------------------------

# What every released model of the family says; anything else would be silently wrong here.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
}
_FAMILIES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


def _read_json(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} could not be read as a config.json: {reason}.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not a config.json: it holds a JSON {type(content).__name__} instead of an "
            "object of names and values."
        )
    return content


def _from_hf(cls: type[ModelConfig], hf: dict[str, Any]) -> ModelConfig:
    family = hf.get("model_type")
    if family not in (*_FAMILIES, "kimi_k2"):
        raise UserError(
            f"model_type={family!r} is not of this family; expected deepseek_v2, deepseek_v3 or "
            "kimi_k2."
        )
    for name, expected in _FIXED.items():
        if hf.get(name, expected) != expected:
            raise UserError(
                f"config.json says {name}={hf[name]!r}; only {expected!r} is supported."
            )
    own = {f.name for f in dataclasses.fields(cls)}
    fields = {name: value for name, value in hf.items() if name in own}
    v2 = family == "deepseek_v2"
    fields.setdefault("topk_method", "greedy" if v2 else "noaux_tc")
    fields.setdefault("scoring_func", "softmax" if v2 else "sigmoid")
    # Written by newer transformers; the older flat fields otherwise.
    rope = hf.get("rope_parameters") or {}
    fields["rope_theta"] = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    fields["rope_scaling"] = _yarn_from_hf(hf.get("rope_scaling") or rope)
    if fields["topk_method"] == "greedy":  # the released code ignores the groups here
        fields["n_group"] = fields["topk_group"] = 1
    for name in ("n_group", "topk_group", "n_shared_experts"):
        if fields.get(name, 0) is None:
            fields[name] = 0 if name == "n_shared_experts" else 1
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.name not in fields
    ]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}.")
    return cls(**fields)


def _yarn_from_hf(scaling: dict[str, Any]) -> Yarn | None:
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise UserError(f"rope_scaling type {kind!r} is not supported; the family uses 'yarn'.")
    names = {f.name for f in dataclasses.fields(Yarn)}
    # The released code's defaults, which are not those of the released files.
    values: dict[str, Any] = {"mscale": 1.0, "mscale_all_dim": 0.0} | scaling
    return Yarn(**{k: v for k, v in values.items() if k in names and v is not None})


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    hf = {k: v for k, v in dataclasses.asdict(config).items() if k != "rope_scaling"}
    family = "deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"
    if config.rope_scaling is not None:
        hf["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(config.rope_scaling)}
    else:
        hf["rope_scaling"] = None
    return {
        "architectures": [_FAMILIES[family]],
        "model_type": family,
        **_FIXED,
        "num_key_value_heads": config.num_attention_heads,
        "attention_dropout": 0.0,
        "use_cache": True,
        **hf,
    }
