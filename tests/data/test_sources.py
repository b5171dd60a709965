import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.sources import list_files, open_files
from deepseek_jax.types import UserError

TEXTS = ["one\n", "two über", "", "three 🙂\r\n", "four"]


def read(path, **options):
    documents = open_files(list_files([str(path)]), **options)
    documents = pickle.loads(pickle.dumps(documents))  # as for a worker process
    return [documents[i] for i in range(len(documents))]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


def write_parquet(path, texts, field="text"):
    pq.write_table(pa.table({"id": range(len(texts)), field: texts}), path, row_group_size=2)


def write_array_record(path, texts):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "array_record": write_array_record}


@pytest.mark.parametrize("suffix", WRITERS)
def test_record_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    WRITERS[suffix](path, TEXTS)
    assert read(path) == TEXTS


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_text_field(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    WRITERS[suffix](path, TEXTS, "body")
    assert read(path, text_field="body") == TEXTS


def test_plain_file_is_one_document(tmp_path):
    (tmp_path / "a.md").write_bytes("x\r\n\ufeffy".encode())
    assert read(tmp_path / "a.md") == ["x\r\n\ufeffy"]


def test_directory_mixes_formats_in_sorted_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["b1", "b2"])
    write_parquet(tmp_path / "d.parquet", ["d1", "d2", "d3"])
    write_parquet(tmp_path / "e.parquet", ["e1"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "z.txt").write_text("z")
    for name in ("a.txt", "c.txt", "ignored.py"):
        (tmp_path / name).write_text(name[0])
    assert read(tmp_path) == ["a", "b1", "b2", "c", "d1", "d2", "d3", "e1", "z"]


def test_globs_and_several_entries(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("deep/a.py", "b.py", "c.md", "brackets[1].txt"):
        (tmp_path / name).write_text(name)
    entries = [f"{tmp_path}/brackets[1].txt", f"{tmp_path}/*.md", f"{tmp_path}/**/*.py"]
    names = [str(path.relative_to(tmp_path)) for path in list_files(entries)]
    assert names == ["brackets[1].txt", "c.md", "b.py", "deep/a.py"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab |", max_size=8), min_size=1, max_size=6))
def test_separator_cuts_as_split_does(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("separated") / "a.txt"
    text = "||".join(parts)
    path.write_text(text)
    assert read(path, separator="||") == (text.split("||") if text else [])


def test_stdlib_is_python_source_in_a_fixed_order():
    files = list_files(["stdlib"])
    assert files == list_files(["stdlib"]) == sorted(files)
    assert {path.suffix for path in files} == {".py"}
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py"} < names
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert not any({"test", "tests", "site-packages"} & set(path.parts) for path in files)
    assert 8e6 < sum(path.stat().st_size for path in files) < 20e6


def test_stdlib_is_utf8():
    documents = open_files(list_files(["stdlib"]))
    assert all(isinstance(documents[i], str) for i in range(len(documents)))


def test_blank_lines_of_jsonl_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "x"}\n  \r\n{"text": "y"}')
    assert read(tmp_path / "a.jsonl") == ["x", "y"]


BAD_LINES = {
    r"line 3 is not JSON": b'{"text": "x',
    r'line 3 has no text under "text"': b'{"body": "x"}',
    r'line 3 has no text under "text": set': b'["x"]',
    r'line 3 has no text under "text": set `text_field`': b'{"text": null}',
    r"line 3 holds half a surrogate pair": b'{"text": "\\ud800"}',
    r"not UTF-8 at byte 25": b'{"text": "\xff"}',
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_bad_jsonl_names_file_and_line(tmp_path, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n' + BAD_LINES[message] + b"\n")
    with pytest.raises(UserError, match=rf"bad\.jsonl.*{message}"):
        read(path)


def test_not_utf8_names_file_and_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("gemäß".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 at byte 3"):
        read(path)
    path.write_bytes(b"good||b\xffd")
    with pytest.raises(UserError, match="not UTF-8 at byte 7"):
        read(path, separator="||")


def test_array_record_not_utf8_names_record(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(b"good")
    writer.write(b"b\xff")
    writer.close()
    with pytest.raises(UserError, match=r"a\.array_record, record 2, is not UTF-8 at byte 1"):
        read(tmp_path / "a.array_record")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_without_permission(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*secret\.txt"):
        read(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_file_that_cannot_be_opened(tmp_path, suffix):
    path = tmp_path / f"gone.{suffix}"
    path.write_text("x")
    files = list_files([str(path)])
    path.unlink()
    with pytest.raises(UserError, match=rf"cannot read .*gone\.{suffix}"):
        open_files(files)[0]


@pytest.mark.parametrize(("suffix", "name"), [("parquet", "Parquet"), ("array_record", "Array")])
def test_damaged_records(tmp_path, suffix, name):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(UserError, match=rf"cannot read .*damaged\.{suffix} as {name}"):
        read(path)


def test_parquet_without_the_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, "body")
    with pytest.raises(UserError, match=r'no column "text" \(it has id, body\)'):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("column", [["x", None], [1, 2]])
def test_parquet_row_without_text(tmp_path, column):
    write_parquet(tmp_path / "a.parquet", column)
    with pytest.raises(UserError, match=r"a\.parquet, row . of row group 0 has no text"):
        read(tmp_path / "a.parquet")


def test_missing_path_and_empty_matches(tmp_path):
    with pytest.raises(UserError, match=r"no such file or directory: .*nowhere"):
        list_files([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="no file matches"):
        list_files([str(tmp_path / "*.txt")])
    with pytest.raises(UserError, match=r"it holds no \.txt"):
        list_files([str(tmp_path)])
    with pytest.raises(UserError, match="no source"):
        list_files([])
