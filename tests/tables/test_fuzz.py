"""Random tables, written in several formats: every reader gives what was written.

`make test-fuzz` draws many; `MADEWITHML_FUZZ_EXAMPLES` sets how many."""
import csv
import io
import os
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from madewithml.data import build_texts, read_table, table_texts  # noqa: E402
from madewithml.tables import (  # noqa: E402
    open_table, open_table_writer, read_table_file, text_column, write_csv)

pytestmark = pytest.mark.fuzz
EXAMPLES = int(os.environ.get("MADEWITHML_FUZZ_EXAMPLES", "5000"))
CHARS = st.characters(codec="utf-8", exclude_characters="\x00")
WORDS = st.sampled_from(["007", "NA", "null", "1e3", "a,b", "x;y", 'say "hi"', "it's", "a\tb",
                         "line\nbreak", "carriage\rreturn", "", " ", "{}", "[1]", "#", "\\"])
CELLS = st.one_of(WORDS, st.text(CHARS, max_size=20))
ROWS = st.lists(st.tuples(CELLS, CELLS, st.sampled_from(["a", "b"])), min_size=1, max_size=12)
NAMES = ("title", "description", "tag")


def as_rows(rows: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    return [dict(zip(NAMES, row, strict=True)) for row in rows]


@settings(max_examples=EXAMPLES, deadline=None)
@given(ROWS, st.sampled_from([",", ";", "\t", "|"]), st.booleans())
def test_csv(rows: list[tuple[str, str, str]], delimiter: str, quote_all: bool) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter,
                        quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    writer.writerows([NAMES, *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        path.write_bytes(buffer.getvalue().encode())
        assert read_table_file(path).to_pylist() == as_rows(rows)


@settings(max_examples=EXAMPLES, deadline=None)
@given(ROWS)
def test_own_files(rows: list[tuple[str, str, str]]) -> None:
    """What the system writes, and Parquet and JSON lines of the same rows."""
    frame = pd.DataFrame(rows, columns=list(NAMES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_csv(frame, folder / "table.csv")
        frame.to_parquet(folder / "table.parquet")
        frame.to_json(folder / "table.jsonl", orient="records", lines=True)
        for path in folder.iterdir():
            assert read_table_file(path).to_pylist() == as_rows(rows), path.suffix


COLUMN_TYPES: dict[pa.DataType, st.SearchStrategy] = {
    pa.string(): CELLS,
    pa.int64(): st.integers(-2**63, 2**63 - 1),
    pa.float64(): st.floats(allow_nan=False, allow_infinity=False),
    pa.bool_(): st.booleans(),
    pa.date32(): st.dates(),
}


@st.composite
def typed_tables(draw: st.DrawFn) -> pa.Table:
    """A table of 2 to 8 columns, with gaps, of up to 3,000 rows."""
    num_rows = draw(st.one_of(st.integers(1, 20), st.integers(21, 3000)))
    columns = {}
    for i in range(draw(st.integers(2, 8))):
        column_type = draw(st.sampled_from(list(COLUMN_TYPES)))
        values = draw(st.lists(st.none() | COLUMN_TYPES[column_type], min_size=1, max_size=20))
        repeated = values * (num_rows // len(values) + 1)
        columns[f"column {i}"] = pa.array(repeated[:num_rows], column_type)
    return pa.table(columns)


def as_texts(table: pa.Table) -> dict[str, list[str | None]]:
    return {name: text_column(table, name).to_pylist() for name in table.column_names}


def written_texts(table: pa.Table, source: pa.Table) -> list[list[str]]:
    """The columns that are text in the source, a gap as empty text."""
    return [[value or "" for value in text_column(table, column.name).to_pylist()]
            for column in source.schema if column.type == pa.string()]


@settings(max_examples=EXAMPLES, deadline=None)
@given(typed_tables())
def test_typed_columns(table: pa.Table) -> None:
    """Parquet and JSON lines keep every value, CSV every text; every reader gives the same."""
    text_columns = ("column 0", "column 1")
    with tempfile.TemporaryDirectory() as name:
        for suffix in ("parquet", "jsonl", "csv"):
            path = Path(name) / f"table.{suffix}"
            with open_table_writer(path, table.schema) as writer:  # as predictions are written
                writer.write_table(table)
            reader = open_table(path)
            streamed = pa.Table.from_batches(reader.batches(), reader.schema)  # as predicted
            assert streamed.equals(reader.read())
            rows = read_table(path, text_columns)  # as validated and trained on
            texts = build_texts(rows, columns=text_columns)
            assert texts == table_texts(streamed, columns=text_columns)
            if suffix == "csv":  # it has no gaps, and writes numbers and dates in its own way
                assert written_texts(streamed, table) == written_texts(table, table)
                continue
            assert as_texts(streamed) == as_texts(table), suffix
            assert texts == table_texts(table, columns=text_columns), suffix
            assert suffix != "parquet" or streamed.equals(table)
