#!/usr/bin/env bash
# fastapi 0.165.0 with openapi-python-client 0.29.1: one handler for `/models/{name}` and
# `/models/{name}/versions/{version}`, with `version: str | None = None`, loses its second path in
# generated clients.
#
# An informed guess: FastAPI knows that a path parameter is always there, so its description says
# `string`, and the shorter path has no such parameter. Seen: the description of the path parameter
# is required and "string or null", which the generator refuses ("None | str is not allowed in
# path"): it warns, leaves the endpoint out and ends with exit code 0. On the shorter path the
# argument silently becomes a query parameter. A handler for each path, or `--fail-on-warning`,
# keeps clients whole; services with versioned models (the Open Inference Protocol) meet this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    fastapi==0.165.0 openapi-python-client==0.29.1
"$folder/venv/bin/python" - "$folder/openapi.json" <<'PY'
import json
import sys

from fastapi import FastAPI

app = FastAPI()


@app.get("/models/{name}")
@app.get("/models/{name}/versions/{version}")
def metadata(name: str, version: str | None = None) -> dict:
    return {}


description = app.openapi()
short, versioned = (description["paths"][path]["get"]["parameters"]
                    for path in ("/models/{name}", "/models/{name}/versions/{version}"))
print(json.dumps(versioned[1]), short[1]["in"])
assert versioned[1]["in"] == "path" and versioned[1]["required"]
assert {"type": "null"} in versioned[1]["schema"]["anyOf"]
assert (short[1]["name"], short[1]["in"]) == ("version", "query")
json.dump(description, open(sys.argv[1], "w"))
PY
PATH="$folder/venv/bin:$PATH" openapi-python-client generate --meta none \
    --path "$folder/openapi.json" --output-path "$folder/client" > "$folder/output" 2>&1
cat "$folder/output"
grep -q "None | str is not allowed in path" "$folder/output"
test "$(find "$folder/client/api" -name '*get*.py' | wc -l)" = 1
