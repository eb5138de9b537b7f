"""Small tables of every kind that a stranger may bring, and the formats that can hold them."""
import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import feather, parquet

Rows = list[dict[str, Any]]
THINGS = ("engine", "harbor", "violin", "garden", "window", "letter", "kettle", "ladder", "mirror",
          "pillow", "rocket", "saddle")


@dataclass
class Kind:
    """A table with a text and a label column, and what the stages must make of it."""

    rows: Rows
    texts: list[str | None] = field(default_factory=list)  # as read; empty: as in the rows
    labels: list[str] = field(default_factory=list)  # as trained on; empty: as in the rows
    repairs: dict[str, int] = field(default_factory=dict)  # rows of each repair
    warnings: set[str] = field(default_factory=set)  # parts of the expectations that fail
    types: dict[str, pa.DataType] = field(default_factory=dict)  # of columns in Parquet
    formats: tuple[str, ...] = ()  # that can hold it; empty: all
    refused: str = ""  # part of the line that ends a training
    refused_row: int | None = None  # position of the row whose number follows there

    def expected_texts(self) -> list[str | None]:
        """The text of each row as a reader gives it."""
        return self.texts or [row["text"] for row in self.rows]

    def expected_labels(self) -> list[str]:
        """The label of each row as a reader gives it."""
        return self.labels or [row["label"] for row in self.rows]


def vary(num_rows: int = 24, **columns: Callable[[int], Any]) -> Rows:
    """Rows with two labels and different texts, except where a column is given."""
    usual = {"text": lambda i: f"The {THINGS[i % 12]} is number {i}",
             "label": lambda i: "ab"[i % 2]}
    return [{name: value(i) for name, value in (usual | columns).items()}
            for i in range(num_rows)]


def of(*values: Any) -> Callable[[int], Any]:
    """A column that repeats these values."""
    return lambda i: values[i % len(values)]


def replaced(rows: Rows, **cells: dict[int, Any]) -> Rows:
    """The rows with other values in single cells."""
    return [row | {name: values[i] for name, values in cells.items() if i in values}
            for i, row in enumerate(rows)]


def labeled(*labels: str) -> Kind:
    """Text labels that must stay as they are."""
    return Kind(vary(label=of(*labels)))


def with_texts(*patterns: str) -> Kind:
    """Texts of a kind, then the same with the row's number, at `{}` or at the end."""
    def text(i: int) -> str:
        pattern = patterns[i % len(patterns)]
        is_first = i < len(patterns)
        return pattern.replace("{}", str(i)) if "{}" in pattern or is_first else f"{pattern} {i}"

    return Kind(vary(text=text))


ZONE = datetime(2026, 3, 1, 12, tzinfo=UTC)
TYPED = ("parquet", "feather")
JSON = ("jsonl", "json", "jsonl.gz")
NOT_CSV = (*TYPED, *JSON)

KINDS: dict[str, Kind] = {
    "plain": Kind(vary()),
    # Labels: text as written.
    "labels with leading zeros": labeled("007", "00123"),
    "labels like floats": labeled("1e3", "2020.0"),
    "labels like times": labeled("10:30", "11:45"),
    "labels of twenty digits": labeled("12345678901234567890", "12345678901234567891"),
    "labels like booleans": labeled("True", "False"),
    "labels like gaps": labeled("NA", "None", "null", "nan"),
    "labels like dates": labeled("2026-01-02", "2026-01-03"),
    "labels with signs": labeled("+1", "-1", "-0"),
    "labels with quotes and slashes": labeled("Anger/Disgust", 'say "hi"', "it's"),
    "labels with percent signs and braces": labeled("50%2F", "{a}", "{{b}}", "[c]"),
    "labels with separators": labeled("a,b", "a;b", "a|b"),
    "labels with blanks and dots": labeled("not sure", "v1.2", "...x"),
    "labels in capitals": labeled("SPAM", "HAM"),
    "labels that are emoji": labeled("🙂", "👩‍💻", "👎🏽"),
    "labels of other scripts": labeled("да", "未知", "نعم"),
    "labels with blanks around them": Kind(vary(label=of(" a", "b ", "a\u00a0")),
                                           labels=["a", "b", "a"] * 8),
    "labels that differ in Unicode form": Kind(vary(label=of("caf\u00e9", "cafe\u0301", "tea")),
                                               labels=["caf\u00e9", "caf\u00e9", "tea"] * 8),
    "labels as integers": Kind(vary(label=of(1, 2)), labels=["1", "2"] * 12),
    "labels as integers with a gap": Kind(
        replaced(vary(label=of(1, 2)), label={5: None}),
        labels=["1", "2", "1", "2", "1", *["1", "2"] * 9],
        repairs={"without a label": 1}, warnings={"'label' is not missing"}),
    "labels as floats": Kind(vary(label=of(1.0, 0.5)), labels=["1", "0.5"] * 12, formats=NOT_CSV),
    "labels as booleans": Kind(vary(label=of(True, False)), labels=["true", "false"] * 12,
                               formats=NOT_CSV),
    "labels as a dictionary": Kind(vary(), types={"label": pa.dictionary(pa.int8(), pa.string())},
                                   formats=TYPED),
    "labels as bytes": Kind(vary(), types={"label": pa.binary()}, formats=TYPED),
    "labels as unsigned bytes": Kind(vary(label=of(0, 255)), labels=["0", "255"] * 12,
                                     types={"label": pa.uint8()}, formats=TYPED),
    "hundred labels": Kind(vary(300, label=lambda i: f"class {i % 100}")),
    "few rows of a label": Kind(vary(60, label=lambda i: "rare" if i < 2 else "usual")),
    "one row of a label": Kind(vary(60, label=lambda i: "once" if i == 7 else "ab"[i % 2])),
    "two labels of one text each": Kind(vary(2)),
    # Texts: what distinguishes them is kept.
    "texts like numbers": Kind(vary(text=lambda i: f"00{i}")),
    "texts as integers": Kind(vary(text=lambda i: 2000 + i), texts=[str(2000 + i)
                                                                    for i in range(24)]),
    "texts as floats without a fraction": Kind(
        vary(text=lambda i: 2000.0 + i), texts=[str(2000 + i) for i in range(24)],
        types={"text": pa.float64()}, formats=TYPED),
    "texts like gaps": with_texts("NA", "None", "null", "nan {}", "#N/A", "\\N {}"),
    "texts with quotes": with_texts('say "hi" {}', "it's {}", '"', "''{}"),
    "texts with separators": with_texts("a, b {}", "a; b {}", "a | b {}"),
    "texts with line breaks": with_texts("one\ntwo {}", "one\r\ntwo {}", "\nthree {}"),
    "texts with carriage returns": with_texts("one\rtwo {}", "three\r{}"),
    "texts with tabs": Kind(vary(text=lambda i: f"one\ttwo {i}")),
    "texts that begin with a number sign": with_texts("# {}", "#tag {}"),
    "texts like formulas": with_texts("=1+{}", "@cmd {}", "-{}", "+{}"),
    "texts with backslashes": with_texts("C:\\new\\{}", "\\", "a\\\"b {}"),
    "texts with line separators": with_texts("a\u2028b {}", "a\u0085b {}", "a\u000bb {}"),
    "texts with blanks around them": with_texts(" {} ", "\u3000{} a"),
    "texts with zero-width characters": with_texts("a\u200bb {}", "\ufeffc {}"),
    "texts that differ in signs": Kind(vary(4, text=of("I like C++", "I like C#", "Hi :)",
                                                       "Hi :("))),
    "texts that differ in vowel signs": Kind(vary(4, text=of("कि", "की", "कु", "कू"))),
    "texts with joiners": with_texts("می‌روم {}", "می‌خواهم {}"),
    "texts from right to left": with_texts("مرحبا {}", "שלום {}"),
    "texts of emoji": Kind(vary(6, text=of("🙂", "🙃", "👩‍💻", "👎🏽", "🇩🇪", "🎉"))),
    "texts of one character": Kind(vary(6, text=of("好", "坏", "大", "小", "多", "少"))),
    "texts with markup": with_texts("<b>bold {}</b> &amp; more", "[a {}](http://b.example/)"),
    "texts of addresses": with_texts("https://a.example/{}", "www.b.example/{}?x=1"),
    "texts of thousands of words": Kind(
        replaced(vary(), text={3: "long " * 3000 + "end"}), warnings={"1000 words"}),
    "texts in a dictionary with a gap": Kind(
        replaced(vary(), text={4: None}), types={"text": pa.dictionary(pa.int8(), pa.string())},
        repairs={"without a text": 1}, warnings={"'text' is not missing"}, formats=TYPED),
    "texts as large strings": Kind(vary(), types={"text": pa.large_string()}, formats=TYPED),
    "texts as bytes": Kind(vary(), types={"text": pa.binary()}, formats=TYPED),
    "texts as lists of words": Kind(
        vary(text=lambda i: ["word", THINGS[i % 12], str(i)]),
        texts=[f"word {THINGS[i % 12]} {i}" for i in range(24)], formats=NOT_CSV),
    "texts as lists of thousand words": Kind(
        vary(4, text=lambda i: [f"w{i}"] * 1500),
        texts=[" ".join([f"w{i}"] * 1500) for i in range(4)], formats=NOT_CSV),
    # Rows that a training repairs.
    "a row without a text": Kind(
        replaced(vary(), text={9: None}), repairs={"without a text": 1},
        warnings={"'text' is not missing"}, formats=NOT_CSV),
    "an empty text": Kind(
        replaced(vary(), text={9: ""}), repairs={"without a text": 1}),
    "a row without a label": Kind(
        replaced(vary(), label={9: ""}), labels=[row["label"] for i, row in enumerate(vary())
                                                 if i != 9],
        repairs={"without a label": 1}),
    "repeated rows": Kind(vary(30, text=lambda i: f"The {THINGS[i % 12]} is here"),
                          repairs={"repetitions": 18}),
    "conflicting labels": Kind(
        replaced(vary(), text={0: "The same", 2: "The same", 3: "The same"}),
        repairs={"other labels": 1, "repetitions": 2}),
    "many rows alike": Kind(vary(50, text=lambda i: "The same" if i < 30 else f"Other {i}",
                                 label=lambda i: "a" if i < 30 else "ab"[i % 2]),
                            repairs={"repetitions": 29}),
    # Further columns: returned as they came.
    "label first": Kind([{"label": row["label"], "text": row["text"]} for row in vary()]),
    "columns named with blanks and signs": Kind(vary(**{
        "my note": of("x", ""), "größe (%)": of("1"), "a.b/c": of("y")})),
    "columns named like those of a model": Kind(vary(
        index=lambda i: str(i), id=of("7"), labels=of("z"), input_ids=of("1 2"),
        length=of("3"), text_clean=of("t"))),
    "a table of predictions": Kind(vary(prediction=of("a"), confidence=of("0.5"),
                                        probability_a=of("0.5"))),
    "dates with the day first": Kind(vary(created_on=lambda i: f"{i + 1:02}/02/2026")),
    "dates in epoch seconds": Kind(vary(created_on=lambda i: str(1_767_225_600 + i * 86_400))),
    "digits that become text": Kind(replaced(vary(code=of("1")), code={23: "A12"})),
    "a column of gaps": Kind(vary(note=of(None)), formats=NOT_CSV),
    "times with a zone": Kind(vary(at=lambda i: ZONE + timedelta(hours=i)),
                              types={"at": pa.timestamp("us", "Europe/Berlin")}, formats=TYPED),
    "decimals": Kind(vary(price=lambda i: Decimal(i) / 100), types={"price": pa.decimal128(9, 2)},
                     formats=TYPED),
    "nested values": Kind(vary(meta=lambda i: {"n": i, "tags": ["x", "y"]}), formats=NOT_CSV),
    "values of different kinds": Kind(vary(any=of(1, "x", None, [1, "a"], {"k": True})),
                                      formats=JSON),
    # Refused, each with one line.
    "one label": Kind(vary(label=of("a")), refused="the only label is 'a'"),
    "no label column": Kind([{"text": row["text"], "tag": "x"} for row in vary()],
                            labels=[], refused="column 'label' is missing"),
    "no text column": Kind([{"title": row["text"], "label": row["label"]} for row in vary()],
                           texts=[None], refused="column 'text' is missing"),
    "half without a label": Kind(vary(label=of("a", "")), labels=["a"],
                                 refused="12 of 24 rows have no 'label', the first is row ",
                                 refused_row=1),
    "half without a text": Kind(vary(text=lambda i: f"text {i}" if i % 4 else ""),
                                refused="6 of 24 rows have no text, the first is row ",
                                refused_row=0),
    "texts as objects": Kind(vary(text=lambda i: {"a": i}), texts=[None], formats=TYPED,
                             refused="column 'text' is not text"),
}


def write_text(rows: Rows, delimiter: str = ",", line_end: str = "\n",
               quoting: int = csv.QUOTE_MINIMAL) -> str:
    """The rows as delimiter-separated text. Python quotes a carriage return only from 3.13 on."""
    if any("\r" in str(value) for row in rows for value in row.values()):
        quoting = csv.QUOTE_ALL
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, rows[0], delimiter=delimiter, lineterminator=line_end,
                            quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_arrow(rows: Rows, types: dict[str, pa.DataType]) -> pa.Table:
    """The rows with the types of the kind."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        given = types.get(name)
        if given == pa.binary():
            values = [value.encode() for value in values]
        columns[name] = pa.array(values, given)
    return pa.table(columns)


def as_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _zipped(rows: Rows) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("table.csv", write_text(rows))
    return buffer.getvalue()


BYTES: dict[str, Callable[[Rows], bytes]] = {
    "csv": lambda rows: write_text(rows).encode(),
    "semicolon.csv": lambda rows: write_text(rows, ";").encode(),
    "tsv": lambda rows: write_text(rows, "\t").encode(),
    "pipe.txt": lambda rows: write_text(rows, "|").encode(),
    "quoted.csv": lambda rows: write_text(rows, quoting=csv.QUOTE_ALL).encode(),
    "windows.csv": lambda rows: write_text(rows, line_end="\r\n").encode(),
    "bom.csv": lambda rows: write_text(rows).encode("utf-8-sig"),
    "utf16.csv": lambda rows: write_text(rows).encode("utf-16"),
    "csv.gz": lambda rows: gzip.compress(write_text(rows).encode()),
    "csv.bz2": lambda rows: bz2.compress(write_text(rows).encode()),
    "csv.xz": lambda rows: lzma.compress(write_text(rows).encode()),
    "csv.zst": lambda rows: pa.compress(write_text(rows).encode(), "zstd", asbytes=True),
    "zip": _zipped,
    "jsonl": as_lines,
    "jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
}
FORMATS = (*BYTES, *TYPED)
FAMILIES = ("csv", "jsonl", "parquet")
WITHOUT_HEADER = ("jsonl", "jsonl.gz", "json", *TYPED)


def formats_of(kind: Kind) -> tuple[str, ...]:
    """The formats that can hold it."""
    return kind.formats or FORMATS


def some_formats_of(kind: Kind) -> list[str]:
    """One format of each family, and the kind's own two of the others."""
    possible = formats_of(kind)
    others = [name for name in possible if name not in FAMILIES]
    first = list(KINDS.values()).index(kind)
    own = {others[(first + i) % len(others)] for i in range(2)} if others else set()
    return [name for name in possible if name in FAMILIES or name in own]


def write_kind(kind: Kind, file_format: str, folder: Path) -> Path:
    """Writes the table."""
    path = folder / f"table.{file_format}"
    if file_format == "parquet":
        parquet.write_table(as_arrow(kind.rows, kind.types), path)
    elif file_format == "feather":
        feather.write_feather(as_arrow(kind.rows, kind.types), path)
    else:
        path.write_bytes(BYTES[file_format](kind.rows))
    return path
