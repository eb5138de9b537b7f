#!/usr/bin/env bash
# pandas 3.1.1 on Python 3.11: DataFrame.to_csv does not quote a bare carriage return, so read_csv
# splits that row in two without an error.
#
# Documentation says that QUOTE_MINIMAL (the default) quotes what the format needs. An informed guess
# is that a frame survives to_csv and read_csv: texts scraped from the web or typed on old systems
# contain "\r". Seen: 2 rows become 3, the label of the first is lost; pyarrow refuses the file.
# With lineterminator="\r\n", or quoting=csv.QUOTE_NONNUMERIC, the row survives.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pandas==3.1.1 pyarrow==25.0.0
"$folder/venv/bin/python" - <<'PY'
import csv
import io

import pandas as pd
from pyarrow import ArrowInvalid
from pyarrow import csv as arrow_csv

frame = pd.DataFrame({"text": ["one\rtwo", "x"], "label": ["a", "b"]})
written = frame.to_csv(index=False)
print(repr(written))
read = pd.read_csv(io.BytesIO(written.encode()))
print(read.to_dict("records"))
assert written == "text,label\none\rtwo,a\nx,b\n"
assert len(read) == 3 and pd.isna(read["label"][0])
try:
    arrow_csv.read_csv(io.BytesIO(written.encode()))
    raise SystemExit("pyarrow reads it now")
except ArrowInvalid as error:
    print(error)
for options in ({"lineterminator": "\r\n"}, {"quoting": csv.QUOTE_NONNUMERIC}):
    good = frame.to_csv(index=False, **options)
    assert pd.read_csv(io.BytesIO(good.encode())).equals(frame), options
PY
