"""Slices by name; bad names are one sentence before anything is compiled."""

import importlib.util

import pytest

from deepseek_jax.plan.topology import parse_topology, topology_devices
from deepseek_jax.types import UserError


def test_a_slice_and_its_rings():
    pod = parse_topology("v5p:8x16x16")
    assert (pod.chips, pod.dims) == (2048, (8, 16, 16))
    assert [pod.is_ring(d) for d in range(3)] == [True] * 3
    host = parse_topology("v5p:2x2x1")
    assert not any(host.is_ring(d) for d in range(3))
    half = parse_topology(" V6E:8x16 ")
    assert [half.is_ring(0), half.is_ring(1)] == [False, True]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("v9:4x4x4", "unknown topology 'v9:4x4x4'; write one of v5e, v5p, v6e, tpu7x"),
        ("h100:8", "GPUs are not planned for yet"),
        ("v5p", "needs 3 sizes after the colon, as in v5p:4x4x4"),
        ("v5p:16x16", "needs 3 sizes"),
        ("v6e:4x4x4", "needs 2 sizes after the colon, as in v6e:4x4"),
        ("v5p:4x0x4", "needs 3 sizes"),
        ("v5p:4xfourx4", "needs 3 sizes"),
        ("v6e:32x32", "1024 chips; the largest slice of v6e has 256"),
    ],
)
def test_impossible_names(text, named):
    with pytest.raises(UserError, match=named) as raised:
        parse_topology(text)
    assert str(raised.value).count(". ") == 0


def test_libtpu_missing_is_a_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu, which needs no TPU: pip install"):
        topology_devices(parse_topology("v5p:2x2x1"))


def test_devices_of_a_slice_that_nobody_has():
    pytest.importorskip("libtpu")
    devices = topology_devices(parse_topology("v5p:4x4x4"))
    assert len(devices) == 64
    assert {d.platform for d in devices} == {"tpu"}
    with pytest.raises(UserError, match="libtpu makes no topology 'v5p:3x3x3'"):
        topology_devices(parse_topology("v5p:3x3x3"))
