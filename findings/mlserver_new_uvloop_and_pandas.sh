#!/usr/bin/env bash
# mlserver 1.7.1 (the newest) with what `pip install mlserver` brings today: uvloop 0.23.0, pandas
# 3.1.1. A model with default settings, as in the first example of its documentation.
#
# An informed guess: `mlserver start .` serves it, and a data frame with a column of texts becomes a
# BYTES tensor. Seen: 1. each worker process ends with "There is no current event loop in thread
# 'MainThread'" as soon as it starts, is started again, and after several turns the server gives up:
# uvloop 0.22 and later no longer makes a loop for `asyncio.get_event_loop`. With uvloop 0.21.0, or
# with "parallel_workers": 0, the model is served. 2. `PandasCodec` raises KeyError: 'O' for the text
# dtype of pandas 3; as `object`, or with pandas 2, the same frame is encoded.
set -euo pipefail
folder=$(mktemp -d)
pid=""
cleanup() {
    [ -z "$pid" ] || kill "$pid" 2> /dev/null || true
    wait
    rm -rf "$folder"
}
trap cleanup EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "mlserver==1.7.1" "uvloop==0.23.0" \
    "pandas==3.1.1"
read -r http grpc metrics <<< "$(python3 -c '
import socket
sockets = [socket.socket() for _ in range(3)]
for each in sockets: each.bind(("127.0.0.1", 0))
print(*[each.getsockname()[1] for each in sockets])')"
mkdir "$folder/models"
cat > "$folder/models/echo.py" <<'PY'
from mlserver import MLModel
from mlserver.codecs import decode_args


class Echo(MLModel):
    @decode_args
    async def predict(self, text: list[str]) -> list[str]:
        return text
PY
cat > "$folder/models/model-settings.json" <<'JSON'
{"name": "echo", "implementation": "echo.Echo"}
JSON
settings() {  # further settings
    echo "{\"host\": \"127.0.0.1\", \"http_port\": $http, \"grpc_port\": $grpc,
           \"metrics_port\": $metrics $1}" > "$folder/models/settings.json"
}
serves() {  # whether the model is ready within a minute
    (cd "$folder/models" && exec "$folder/venv/bin/mlserver" start . > "$folder/log" 2>&1) &
    pid=$!
    for _ in $(seq 60); do
        sleep 1
        if curl -sf "http://127.0.0.1:$http/v2/models/echo/ready" > /dev/null; then
            kill "$pid"; wait "$pid" || true; pid=""; return 0
        fi
        kill -0 "$pid" 2> /dev/null || break
    done
    kill "$pid" 2> /dev/null || true; wait "$pid" || true; pid=""; return 1
}
settings ""
if serves; then echo "the default settings are served now"; exit 1; fi
grep -m 1 "There is no current event loop in thread 'MainThread'" "$folder/log"
settings ', "parallel_workers": 0'
serves && echo "served without worker processes"
"$folder/venv/bin/python" - <<'PY'
import pandas as pd
from mlserver.codecs import PandasCodec

frame = pd.DataFrame({"label": ["a text"]})
try:
    PandasCodec.encode_response("model", frame)
    raise SystemExit("a frame of texts is encoded now")
except KeyError as error:
    print(f"dtype {frame['label'].dtype!r}: KeyError {error}")
response = PandasCodec.encode_response("model", frame.astype(object))
print("dtype object:", response.outputs[0].datatype)
assert response.outputs[0].datatype == "BYTES"
PY
echo "as found"
