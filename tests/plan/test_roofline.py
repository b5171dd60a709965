"""The least time of a step, checked by arithmetic on paper."""

import numpy as np
import pytest

from deepseek_jax.plan.collectives import Collective
from deepseek_jax.plan.roofline import roofline, seconds
from deepseek_jax.plan.topology import parse_topology


def _coords(*dims: int) -> np.ndarray:
    """Devices with the first dimension fastest, as libtpu lists them."""
    axes = np.meshgrid(*(np.arange(n) for n in dims[::-1]), indexing="ij")
    return np.stack([axis.ravel() for axis in axes[::-1]], axis=1)


def _one(kind: str, groups: np.ndarray, sent: float, executions: int = 1) -> Collective:
    return Collective(
        "x", kind, ("a",), groups.shape[1], sent, executions, "", 1, "", groups, False
    )


V5P = parse_topology("v5p:4x4x8")
DEVICES = np.arange(128).reshape(8, 4, 4)  # z, y, x
LINK = 100e9  # 1200 GB/s over 6 links and 2 directions


def test_a_link_is_a_twelfth_of_the_published_bandwidth_on_a_3d_torus():
    assert V5P.chip.link_bandwidth == LINK
    assert parse_topology("v6e:16x16").chip.link_bandwidth == LINK  # 800 over 4 links


@pytest.mark.parametrize(
    ("groups", "links"),
    [
        (DEVICES.reshape(8 * 4, 4), 2),  # a ring along x
        (DEVICES.transpose(1, 2, 0).reshape(16, 8), 2),  # along z
        (DEVICES.reshape(8, 16), 4),  # x and y
        (DEVICES.reshape(1, 128), 6),
        (DEVICES[:, :, :2].reshape(32, 2), 1),  # half of x: a line
        (DEVICES[:, :, ::2].reshape(32, 2), 2 / 2),  # every other chip: two groups share the ring
    ],
)
def test_gathers_use_every_link_of_the_dimensions_they_span(groups, links):
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        time = seconds(V5P, _coords(4, 4, 8), _one(kind, groups, 6e9))
        assert time == pytest.approx(6e9 / (links * LINK))


def test_an_all_to_all_is_bound_by_the_middle_of_its_longest_dimension():
    coords = _coords(4, 4, 8)
    along_z = _one("all-to-all", DEVICES.transpose(1, 2, 0).reshape(16, 8), 1e9)
    # Of 8 chips on a ring, 4 send half of 1 GB across 2 cuts: 8/4/2 = 1 GB over a link.
    assert seconds(V5P, coords, along_z) == pytest.approx(1e9 / LINK)
    everything = _one("ragged-all-to-all", DEVICES.reshape(1, 128), 1e9)
    assert seconds(V5P, coords, everything) == pytest.approx(1e9 / LINK)
    line = parse_topology("v5p:2x2x1")
    pair = _one("all-to-all", np.array([[0, 1], [2, 3]]), 1e9)
    assert seconds(line, _coords(2, 2, 1), pair) == pytest.approx(1e9 / 2 / LINK)


def test_a_permute_goes_as_far_as_its_pairs_are_apart():
    ring = np.stack([np.arange(4), (np.arange(4) + 1) % 4], axis=1)
    coords = _coords(4, 4, 8)
    near = _one("collective-permute", ring, 1e9)
    assert seconds(V5P, coords, near) == pytest.approx(1e9 / LINK)  # 3 to 0 wraps around
    far = _one("collective-permute", np.array([[0, 2], [1, 3]]), 1e9)
    assert seconds(V5P, coords, far) == pytest.approx(2e9 / LINK)


def test_two_devices_of_one_chip_need_no_network():
    chip = parse_topology("tpu7x:2x2x1")
    coords = np.repeat(_coords(2, 2, 1), 2, axis=0)
    within = _one("all-gather", np.arange(8).reshape(4, 2), 1e9)
    assert seconds(chip, coords, within) == 0


def test_terms_bound_and_sum():
    groups = DEVICES.reshape(8, 16)
    found = roofline(
        V5P, _coords(4, 4, 8), 459e12 * 3, 2765e9 * 2, [_one("all-gather", groups, 4e9, 50)]
    )
    assert found == pytest.approx((3.0, 2.0, 0.5))
    assert found.bound == "compute"
    assert found.best == pytest.approx(3.0)
    assert found.serial == pytest.approx(5.5)
    halves = roofline(parse_topology("tpu7x:2x2x1"), _coords(2, 2, 1), 2307e12, 0.0, [])
    assert halves.compute == pytest.approx(2.0)  # a device is half a chip
