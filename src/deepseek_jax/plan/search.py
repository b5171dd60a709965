"""Meshes worth trying: a handful, from what the model and the slice allow."""

from deepseek_jax.config import ModelConfig, RematPolicy

# Expert-axis sizes that the reports and open systems use; further ones cost minutes each.
_EXPERT_SIZES = (64, 32, 128, 16, 8, 256, 4, 2, 1)
_MESHES = 3


def candidates(
    config: ModelConfig, devices: int, batch: int, *, decode: bool
) -> list[tuple[str, RematPolicy]]:
    """(mesh, remat policy) pairs, the likeliest first.

    Experts go over the expert axis, which must divide them; the rest of the devices shard
    parameters (``fsdp``) as long as each has sequences, and heads and FFNs (``tensor``) where
    there are more devices than sequences.
    """
    meshes: list[str] = []
    for expert in _EXPERT_SIZES:
        if config.n_routed_experts % expert or devices % expert or len(meshes) == _MESHES:
            continue
        rest, tensor = devices // expert, 1
        while batch % (rest * expert) and rest % 2 == 0:
            rest, tensor = rest // 2, tensor * 2
        fits = batch % (rest * expert) == 0 and config.num_attention_heads % tensor == 0
        if fits:
            sizes = {"fsdp": rest, "expert": expert, "tensor": tensor}
            meshes.append(",".join(f"{a}={n}" for a, n in sizes.items() if n > 1) or "data=1")
    policies: tuple[RematPolicy, ...] = ("none",) if decode else ("full", "selective")
    return [(mesh, policy) for mesh in meshes for policy in policies]
