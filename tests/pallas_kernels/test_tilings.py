"""The table of measured tilings, and the script that writes it."""

import json

import pytest

from benchmarks import autotune
from pallas_kernels.hopper import matmul, tilings

A, B = dict(waves=1, shared="none"), dict(waves=2, shared="b")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table in the place of the real one."""
    path = tmp_path / tilings.TABLE
    path.write_text("{}")
    monkeypatch.setattr(autotune, "TABLE", path)
    monkeypatch.setattr(tilings, "_table", lambda: json.loads(path.read_text()))
    return path


def choose(m, n=512, k=1024, device="a GPU", b_in_tiles=False):
    return matmul.choose_tiling(m, n, k, b_in_tiles=b_in_tiles, device=device, multiprocessors=132)


def test_an_entry_holds_from_its_m_to_the_next(table):
    rule = choose(300)
    assert rule == matmul.tiling_by_rule(300, 512, 1024, b_in_tiles=False, multiprocessors=132)
    for m, tiling in ((256, A), (400, B)):
        entry = dict(m=m, n=512, k=1024, tiling=tiling)
        autotune.write("a GPU", "fp8_matmul, blocks", (m, 512, 1024), entry)
    assert choose(256) == choose(399) == matmul.Tiling(**A)
    assert choose(400) == choose(799) == matmul.Tiling(**B)
    # Anything that was not measured goes by the rule: other rows, sides, device and form.
    for other in (
        dict(m=255),
        dict(m=800),
        dict(m=300, n=256),
        dict(m=300, k=128),
        dict(m=300, device="other"),
    ):
        rule = matmul.tiling_by_rule(
            other["m"],
            other.get("n", 512),
            other.get("k", 1024),
            b_in_tiles=False,
            multiprocessors=132,
        )
        assert choose(**other) == rule
    assert choose(300, b_in_tiles=True) != matmul.Tiling(**A)


def test_few_rows_are_split_unless_the_table_has_them(table):
    assert choose(1) == matmul.tiling_of_few_rows(1, 512, 1024, multiprocessors=132)
    assert choose(1).splits > 1
    assert choose(65).splits == choose(1, b_in_tiles=True).splits == 1
    autotune.write(
        "a GPU", "fp8_matmul, blocks", (1, 512, 1024), dict(m=1, n=512, k=1024, tiling=A)
    )
    assert choose(1) == matmul.Tiling(**A)


def test_writing_replaces_one_shape_and_keeps_the_rest(table):
    def write(device, m, tiling):
        entry = tiling and dict(m=m, n=512, k=1024, tiling=tiling)
        autotune.write(device, "fp8_matmul, blocks", (m, 512, 1024), entry)

    write("a GPU", 256, A)
    write("another", 256, B)
    write("a GPU", 512, B)
    write("a GPU", 256, B)
    entries = json.loads(table.read_text())["a GPU"]["fp8_matmul, blocks"]
    assert [(e["m"], e["tiling"]) for e in entries] == [(256, B), (512, B)]
    write("a GPU", 256, None)  # the rule is as good
    assert choose(256) == matmul.tiling_by_rule(
        256, 512, 1024, b_in_tiles=False, multiprocessors=132
    )
    assert choose(256, device="another") == matmul.Tiling(**B)


def test_the_real_table_holds_tilings_that_exist():
    for operations in tilings._table().values():
        for operation, entries in operations.items():
            assert operation in ("fp8_matmul, blocks", "fp8_matmul, tiles")
            for entry in entries:
                assert set(entry) == {"m", "n", "k", "tiling"}
                matmul.Tiling(**entry["tiling"])


@pytest.mark.parametrize("b_in_tiles", [False, True])
def test_candidates_start_with_the_rule_and_are_all_different(b_in_tiles):
    rule = matmul.tiling_by_rule(4096, 4096, 4096, b_in_tiles=b_in_tiles, multiprocessors=132)
    found = autotune.forms(rule, b_in_tiles=b_in_tiles)
    assert found[0] == rule
    assert len(set(found)) == len(found) >= 6
    for tiling in found:
        others = autotune.refinements(tiling)
        assert tiling not in others
        assert len(set(others)) == len(others) >= 4
