#!/usr/bin/env bash
# pandas 3.1.1 on Python 3.11: to_datetime(format="mixed", dayfirst=True) also swaps day and month of
# ISO dates, and only of those whose day is 12 or less.
#
# Documentation says that dayfirst=True "prefers to parse with day first" and that "10/11/12" is then
# 10 November. An informed guess is that it decides between the readings of 02/03/2026 and leaves
# 2026-03-02 alone, whose order is that of ISO 8601. A table merged from two sources has both kinds.
# Seen: 2026-03-02 becomes 3 February while 2026-03-13 stays in March, without a warning; a time and
# a zone do not change that. Without format="mixed" a column of ISO dates alone raises: its format is
inferred as year, day, month. format="ISO8601" reads it right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pandas==3.1.1
"$folder/venv/bin/python" -W error - <<'PY'
import pandas as pd

def months(dates, **options):
    return pd.to_datetime(pd.Series(dates), dayfirst=True, utc=True, **options).dt.month.tolist()

mixed = ["14/03/2026", "2026-03-02", "2026-03-13", "2026-03-02T10:00:00+01:00"]
print(months(mixed, format="mixed"))
assert months(mixed, format="mixed") == [3, 2, 3, 2]
try:
    months(["2026-03-02", "2026-03-13"])
    raise SystemExit("a column of ISO dates is read now")
except ValueError as error:
    print(str(error).splitlines()[0])
    assert '"%Y-%d-%m"' in str(error)
assert months(["2026-03-02", "2026-03-13"], format="ISO8601") == [3, 3]
PY
