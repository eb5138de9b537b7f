"""Random tables, written in several formats: every reader gives what was written.

`make test-fuzz` draws many; `MADEWITHML_FUZZ_EXAMPLES` sets how many."""
import csv
import io
import os
import tempfile
from pathlib import Path

import pandas as pd
import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from madewithml.tables import read_table_file, write_csv  # noqa: E402

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
