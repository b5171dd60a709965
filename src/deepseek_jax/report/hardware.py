"""What a chip could do at best."""

import re

import jax

# Dense BF16 peak of one chip in FLOP/s, from the vendors' data sheets, by `Device.device_kind`.
# The first match wins. "TPU v5" alone is what JAX calls v5p.
_PEAKS = (
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\b(H100|H200|GH200)\b", 989e12),
    (r"\bB200\b", 2.25e15),
    (r"\bA100\b", 312e12),
    (r"\bTPU v4$", 275e12),
    (r"\bTPU (v5 lite|v5e)", 197e12),
    (r"\bTPU (v5|v5p)$", 459e12),
    (r"\bTPU (v6 lite|v6e)", 918e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """Dense BF16 peak of a device in FLOP/s, the denominator of MFU; None if not known."""
    return peak_of(device.device_kind)


def peak_of(kind: str) -> float | None:
    """`peak_flops` of a kind of device by its name."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, kind)), None)
