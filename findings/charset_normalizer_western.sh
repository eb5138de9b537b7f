#!/usr/bin/env bash
# charset-normalizer 3.5.2: the best match of short Western European text in Windows-1252 is a
# Central European code page, and the text is decoded wrongly, without a sign of doubt.
#
# An informed guess: the most common encoding of CSV files that Excel exports on Western systems is
# found, or nothing is; `chaos` is 0.0 for both. Seen: French and Spanish are read as cp1250, so
# "Crème" becomes "Crčme" and "niño" becomes "nińo". cp1252 is among the matches with the
# same chaos and coherence if the candidates are narrowed by `cp_isolation`; the tie is broken by
# position. Whoever reads tables should prefer cp1252 among equals, and tell what was guessed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check charset-normalizer==3.5.2
"$folder/venv/bin/python" - <<'PY'
from charset_normalizer import from_bytes

french = "id;title;tag\n007;Crème brûlée, warm;dessert\n008;Pâté;starter\n"
spanish = "El niño mañana comerá jamón, ¿qué más?"
for text, wrong in ((french, "Crčme"), (spanish, "nińo")):
    best = from_bytes(text.encode("cp1252")).best()
    print(best.encoding, best.chaos, best.coherence, repr(str(best)[:40]))
    assert best.encoding not in ("cp1252", "latin_1", "iso8859_15") and wrong in str(best)
    narrowed = from_bytes(text.encode("cp1252"), cp_isolation=["cp1250", "cp1252"])
    found = {match.encoding: (match.chaos, match.coherence) for match in narrowed}
    print(found)
    assert narrowed.best().encoding == "cp1250" and "cp1252" in found
PY
