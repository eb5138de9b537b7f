"""Small tables of every kind, each with the values that a reader must give, or its message."""
import bz2
import gzip
import json
import lzma
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from madewithml.config import UserError
from madewithml.data import read_labeled_table, read_table
from madewithml.tables import open_table, read_table_file, write_csv
from madewithml.utils import temporary_env

HELLO = [{"text": "hello, you", "label": "a"}, {"text": "well then", "label": "b"}]
WRITTEN = ["007", "00123", "1e3", "10:30", "12345678901234567890", "True", "NA", "None", "null",
           "nan", "2020.0", "-0", "+5", "1_000", "0x1F", "=1+1", "#N/A", "''", "\\N", "01/02/2020"]


def quoted(*texts: str) -> str:
    """A CSV file with these texts, all quoted, and a label."""
    lines = [f'"{text.replace(chr(34), chr(34) * 2)}",{"ab"[i % 2]}'
             for i, text in enumerate(texts)]
    return "\n".join(["text,label", *lines]) + "\n"


CSV: dict[str, tuple[str | bytes, list[dict[str, Any]]]] = {
    "comma": ('text,label\n"hello, you",a\nwell then,b\n', HELLO),
    "semicolon": ("text;label\nhello, you;a\nwell then;b\n", HELLO),
    "tab": ("text\tlabel\nhello, you\ta\nwell then\tb\n", HELLO),
    "pipe": ("text|label\nhello, you|a\nwell then|b\n", HELLO),
    "single quotes": ("text,label\n'hello, you',a\n'well then',b\n", HELLO),
    "backslash escapes": ('text,label\n"say \\"hi\\", you",a\n"well then",b\n',
                          [{"text": 'say "hi", you', "label": "a"}, HELLO[1]]),
    "doubled quotes": ('text,label\n"say ""hi"", you",a\nwell then,b\n',
                       [{"text": 'say "hi", you', "label": "a"}, HELLO[1]]),
    "quoted header": ('"text","label"\n"hello, you","a"\n"well then","b"\n', HELLO),
    "windows line ends": ('text,label\r\n"hello, you",a\r\nwell then,b\r\n', HELLO),
    "old mac line ends": ('text,label\r"hello, you",a\rwell then,b\r', HELLO),
    "no line end at the end": ('text,label\n"hello, you",a\nwell then,b', HELLO),
    "blank lines": ('text,label\n\n"hello, you",a\n\n\nwell then,b\n\n', HELLO),
    "label first": ('label,text\na,"hello, you"\nb,well then\n', HELLO),
    "further columns": ('x,text,y,label\n1,"hello, you",,a\n2,well then,z,b\n',
                        [{"x": "1", **HELLO[0], "y": ""}, {"x": "2", **HELLO[1], "y": "z"}]),
    "line breaks in quotes": (quoted("one\ntwo, three", "x"),
                              [{"text": "one\ntwo, three", "label": "a"},
                               {"text": "x", "label": "b"}]),
    "carriage return in quotes": (quoted("one\rtwo", "x"), [{"text": "one\rtwo", "label": "a"},
                                                            {"text": "x", "label": "b"}]),
    "empty cells": ("text,label\n,a\nbye,\n", [{"text": "", "label": "a"},
                                               {"text": "bye", "label": ""}]),
    "as written": (quoted(*WRITTEN), [{"text": text, "label": "ab"[i % 2]}
                                      for i, text in enumerate(WRITTEN)]),
    "emoji and scripts": (quoted("naïve 🙂 👩‍💻", "नमस्ते", "می‌روم"),
                          [{"text": "naïve 🙂 👩‍💻", "label": "a"},
                           {"text": "नमस्ते", "label": "b"}, {"text": "می‌روم", "label": "a"}]),
    "utf-8 with a byte order mark": (("text,label\nü,a\né,b\n").encode("utf-8-sig"),
                                     [{"text": "ü", "label": "a"}, {"text": "é", "label": "b"}]),
    "utf-16": ("text,label\nü,a\né,b\n".encode("utf-16"),
               [{"text": "ü", "label": "a"}, {"text": "é", "label": "b"}]),
    "windows-1252": ("text,label\ncrème brûlée,a\npâté,b\n".encode("cp1252"),
                     [{"text": "crème brûlée", "label": "a"}, {"text": "pâté", "label": "b"}]),
    "windows-1251": ("text,label\nпривет как дела,a\nспасибо хорошо,b\n".encode("cp1251"),
                     [{"text": "привет как дела", "label": "a"},
                      {"text": "спасибо хорошо", "label": "b"}]),
    "windows-1251 late in the file": (
        b"text,code\n" + b"a,1\n" * 400_000 + "привет как дела,спасибо\n".encode("cp1251"),
        [{"text": "a", "code": "1"}] * 400_000 + [{"text": "привет как дела", "code": "спасибо"}]),
    "utf-8 late in the file": (
        "text,code\n" + "a,1\n" * 400_000 + "Größe,1\n",
        [{"text": "a", "code": "1"}] * 400_000 + [{"text": "Größe", "code": "1"}]),
    "no header": ("ham\thello there\nspam\twin now\nham\tbye then\n",
                  [{"column_1": "ham", "column_2": "hello there"},
                   {"column_1": "spam", "column_2": "win now"},
                   {"column_1": "ham", "column_2": "bye then"}]),
    "stray quotes": ('ham\tsay "hi there\nspam\tfree 5" tv\nham\tok\n',
                     [{"column_1": "ham", "column_2": 'say "hi there'},
                      {"column_1": "spam", "column_2": 'free 5" tv'},
                      {"column_1": "ham", "column_2": "ok"}]),
    "one column": ("text\nhello you\nwell then\n", [{"text": "hello you"}, {"text": "well then"}]),
    "json in a cell": ('text,meta\na,"{""x"": [1, 2]}"\nb,"{}"\n',
                       [{"text": "a", "meta": '{"x": [1, 2]}'}, {"text": "b", "meta": "{}"}]),
    "decimal commas": ("text;price\nhello;1,5\nyou;2,5\n", [{"text": "hello", "price": "1,5"},
                                                            {"text": "you", "price": "2,5"}]),
    "text late in a column of digits": (
        "text,code\n" + "a,1\n" * 200_000 + "a,A12\n", [{"text": "a", "code": "1"}] * 200_000
        + [{"text": "a", "code": "A12"}]),
    "a column that is empty for long": (
        "text,code\n" + "a,\n" * 400_000 + "a,A12\n",
        [{"text": "a", "code": ""}] * 400_000 + [{"text": "a", "code": "A12"}]),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
MISTAKES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("t.csv", "", "t.csv: the file is empty"),
    "blank": ("t.csv", "\n\n  \n", "t.csv: the file is empty"),
    "wider row": ("t.csv", "a,b\n1,2\n3,4,5\n6,7\n", "line 3: 3 fields instead of 2"),
    "line after a long cell": ("t.csv", 'a,b\n"x\ny\nz",2\n3,4,5\n1,2\n', "line 5: 3 fields"),
    "open quote": ("t.csv", 'a,b\n"x,1",2\n"y, z",3\n"y,3\nz,4\n', "line 4 to 5: 1 field"),
    "two columns of one name": ("t.csv", "a,a\nx,y\n", "column 'a' appears twice in the header"),
    "broken JSON line": ("t.jsonl", '{"a": 1}\n\n{"a": \n', "t.jsonl: line 3: "),
    "JSON line that is a list": ("t.jsonl", '{"a": 1}\n[1]\n', "line 2 is not a JSON object"),
    "broken array": ("t.json", '[{"a": 1},', "t.json: "),
    "array of numbers": ("t.json", "[1, 2]", "item 1 is not a JSON object"),
    "broken Parquet": ("t.parquet", b"PAR1" + b"\xff" * 20 + b"PAR1", "t.parquet: "),
    "broken Feather": ("t.feather", b"ARROW1" + b"\xff" * 40, "t.feather: "),
    "no such file": ("t.csv", None, "t.csv: no such file"),
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", CSV)
def test_csv(name: str, tmp_path: Path) -> None:
    content, rows = CSV[name]
    assert read_table_file(write(tmp_path, "table.csv", content)).to_pylist() == rows


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed(suffix: str, tmp_path: Path) -> None:
    content, rows = CSV["comma"]
    path = write(tmp_path, f"table.csv.{suffix}", COMPRESSIONS[suffix](content.encode()))
    assert read_table_file(path).to_pylist() == rows


def test_zip_archive(tmp_path: Path) -> None:
    path = tmp_path / "table.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/table.csv", CSV["comma"][0])
    assert read_table_file(path).to_pylist() == HELLO
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other.csv", "a")
    with pytest.raises(UserError, match="the zip archive has 2 files"):
        read_table_file(path)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name: str, tmp_path: Path) -> None:
    file_name, content, message = MISTAKES[name]
    path = tmp_path / file_name if content is None else write(tmp_path, file_name, content)
    with pytest.raises(UserError) as raised:
        read_table_file(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


FRAME = pd.DataFrame({"text": ["007", "NA", None, "x\ry"], "label": ["1", "2", "1", "2"],
                      "number": [1.5, None, 3.0, -1.0]})
WRITERS: dict[str, Callable[[Path], None]] = {
    "table.parquet": lambda path: FRAME.to_parquet(path),
    "indexed.parquet": lambda path: FRAME.set_index("label").to_parquet(path),
    "filtered.parquet": lambda path: pd.concat([FRAME, FRAME]).iloc[:4].to_parquet(path),
    "category.parquet": lambda path: FRAME.astype({"text": "category"}).to_parquet(path),
    "table.feather": lambda path: feather.write_feather(FRAME, path),
    "table.jsonl": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "table.json": lambda path: FRAME.to_json(path, orient="records"),
    "table.ndjson.gz": lambda path: FRAME.to_json(path, orient="records", lines=True,
                                                  compression="gzip"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_same_values_in_every_format(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    with temporary_env({"MADEWITHML_TEXT_COLUMNS": "text", "MADEWITHML_LABEL_COLUMN": "label"}):
        rows = read_labeled_table(tmp_path / name)
    assert rows["text"].tolist() == ["007", "NA", None, "x\ry"]
    assert rows["label"].tolist() == FRAME["label"].tolist()
    assert rows["number"].fillna(0).tolist() == FRAME["number"].fillna(0).tolist()


@pytest.mark.parametrize(("values", "expected"), [
    (pa.array([3, None, 5]), ["3", None, "5"]),
    (pa.array([3.0, None, 5.0]), ["3", None, "5"]),
    (pa.array([0.5, None, 5.0]), ["0.5", None, "5"]),
    (pa.array([True, None, False]), ["true", None, "false"]),
    (pa.array(["x", None, "y"]).dictionary_encode(), ["x", None, "y"]),
    (pa.array([b"x", None, "ü".encode()], pa.binary()), ["x", None, "ü"]),
    (pa.array([["a", "b"], None, ["c"]]), ["a b", None, "c"]),
    (pa.array(["2026-01-02", None, "2026-01-03"]).cast(pa.date32()),
     ["2026-01-02", None, "2026-01-03"]),
], ids=str)
def test_text_from_parquet(values: pa.Array, expected: list[str | None], tmp_path: Path) -> None:
    parquet.write_table(pa.table({"title": values}), tmp_path / "t.parquet")
    with temporary_env({"MADEWITHML_TEXT_COLUMNS": "title"}):
        assert read_table(tmp_path / "t.parquet")["title"].tolist() == expected


@pytest.mark.parametrize("values", [pa.array([{"a": 1}, None]), pa.array([b"\xff\xfe", None])],
                         ids=["struct", "binary"])
def test_column_that_is_not_text(values: pa.Array, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"title": values}), tmp_path / "t.parquet")
    with (temporary_env({"MADEWITHML_TEXT_COLUMNS": "title"}),
          pytest.raises(UserError, match="t.parquet: column 'title' is not text but")):
        read_table(tmp_path / "t.parquet")


def test_long_list_of_words_is_whole(tmp_path: Path) -> None:
    """numpy would abbreviate the printed form of 1,001 words."""
    words = [f"word{i}" for i in range(1500)]
    line = json.dumps({"title": words, "tag": "a"})
    path = write(tmp_path, "t.jsonl", line + "\n")
    with temporary_env({"MADEWITHML_TEXT_COLUMNS": "title"}):
        assert read_table(path)["title"].tolist() == [" ".join(words)]


def test_json_values_of_different_kinds(tmp_path: Path) -> None:
    lines = [{"title": 1984, "any": [1, {"x": None}]}, {"title": "A12", "any": True},
             {"title": None}]
    path = write(tmp_path, "t.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    with temporary_env({"MADEWITHML_TEXT_COLUMNS": "title"}):
        assert read_table(path)["title"].tolist() == ["1984", "A12", None]


def test_excel(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["text", "label"], ["007", 1], ["x", 2.5], [None, 3]):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    assert read_table_file(tmp_path / "t.xlsx").to_pylist() == [
        {"text": "007", "label": 1.0}, {"text": "x", "label": 2.5}, {"text": None, "label": 3.0}]


def test_several_files(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "text,label\nx,1\n")
    write(tmp_path, "b.csv", "label;text\n2;y\n")
    write(tmp_path, ".hidden.csv", "no")
    both = [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]
    assert read_table_file(tmp_path).to_pylist() == both
    assert read_table_file(tmp_path / "*.csv").to_pylist() == both
    assert read_table_file(tmp_path / "?.csv").to_pylist() == both


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Address of a server of the folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_from_the_web(web: str, tmp_path: Path) -> None:
    write(tmp_path, "table.csv", CSV["comma"][0])
    assert read_table_file(f"{web}/table.csv").to_pylist() == HELLO
    with pytest.raises(UserError, match="missing.csv: cannot be fetched"):
        read_table_file(f"{web}/missing.csv")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    texts = ["a\rb", "a\r\nb", '"', ",", "", " x ", "007", "NA", "\\", "é", "a\u2028b", "'"]
    write_csv(pd.DataFrame({"text": texts, "label": "a"}), tmp_path / "t.csv")
    assert read_table_file(tmp_path / "t.csv")["text"].to_pylist() == texts


def test_one_text_of_megabytes(tmp_path: Path) -> None:
    text = "word, " * 1_000_000
    write_csv(pd.DataFrame({"text": [text, "x"], "label": ["a", "b"]}), tmp_path / "t.csv")
    assert read_table_file(tmp_path / "t.csv")["text"][0].as_py() == text


def test_guesses_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "t.txt", "ham\tcrème \"brûlée\nspam\tgagnez déjà\nham\tà bientôt\n"
                 .encode("cp1252"))
    assert open_table(path).notes == (
        "read as cp1252", "quotes are read as part of the text",
        "no header, columns named column_1, column_2")
    blank = write(tmp_path, "t.csv", 'text,label\n"a\nb",x\n\nc,y\n\n')
    assert open_table(blank).notes == ("blank lines are skipped, the first is line 4",)


def test_settings_override_guesses(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "a,ğ\nb,ş\n".encode("cp1254"))
    with temporary_env({"MADEWITHML_CSV_COLUMNS": "x,y", "MADEWITHML_ENCODING": "cp1254"}):
        assert read_table_file(path).to_pylist() == [{"x": "a", "y": "ğ"}, {"x": "b", "y": "ş"}]


def test_a_reader_can_be_used_again(tmp_path: Path) -> None:
    """A reader can be used again, and gives the same."""
    reader = open_table(write(tmp_path, "t.csv", CSV["comma"][0]))
    first, second = (pa.Table.from_batches(reader.batches(), reader.schema) for _ in range(2))
    assert first == second
