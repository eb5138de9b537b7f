#!/usr/bin/env bash
# ray[serve] 2.60.0 with HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1): two Ray clusters on one machine, each
# with an application, HTTP, statistics and metrics ports and HAProxy files of its own.
#
# An informed guess: requests to the second port wait or fail until the second application runs, and
# get its answers afterwards. Seen: while none of its replicas runs (a slow start, a crash), the
# second HAProxy also answers with the FIRST cluster's application, status 200. Each HAProxy has Ray's
# Python proxy as its backup server, at port 8500 in every cluster; the proxies share the port
# (SO_REUSEPORT), so that a connection meets either, and nothing logs an error.
# RAY_SERVE_FALLBACK_PROXY_HTTP_PORT, of each cluster's own, separates them.
set -euo pipefail
folder=$(mktemp -d)
pids=()
cleanup() {
    kill "${pids[@]}" 2> /dev/null || true
    wait
    rm -rf "$folder"
}
trap cleanup EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "ray[serve]==2.60.0"
cat > "$folder/app.py" <<'PY'
import os
import sys
import time

import ray
from fastapi import FastAPI
from ray import serve

name, port, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
app = FastAPI()


@serve.deployment
@serve.ingress(app)
class Application:
    def __init__(self):
        time.sleep(delay)

    @app.get("/")
    def get(self) -> str:
        return name


ray.init(num_cpus=2, include_dashboard=False, _temp_dir=os.environ["RAY_FOLDER"])
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(Application.bind(), blocking=False)
print("ready", flush=True)
time.sleep(600)
PY
read -r first second stats1 stats2 metrics1 metrics2 <<< "$(python3 -c '
import socket
sockets = [socket.socket() for _ in range(6)]
for each in sockets: each.bind(("127.0.0.1", 0))
print(*[each.getsockname()[1] for each in sockets])')"
start() {  # name, port, stats port, seconds to start, metrics port
    mkdir -p "$folder/$1"
    RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_HAPROXY_METRICS_PORT="$5" RAY_FOLDER="$folder/ray-$1" \
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 \
    RAY_SERVE_HAPROXY_STATS_PORT="$3" RAY_SERVE_HAPROXY_CONFIG_FILE_LOC="$folder/$1/haproxy.cfg" \
    RAY_SERVE_HAPROXY_SOCKET_PATH="$folder/$1/admin.sock" \
    RAY_SERVE_HAPROXY_SERVER_STATE_BASE="$folder/$1" \
    RAY_SERVE_HAPROXY_SERVER_STATE_FILE="$folder/$1/server-state" \
    "$folder/venv/bin/python" "$folder/app.py" "$1" "$2" "$4" \
        > "$folder/$1/output" 2>&1 &
    pids+=($!)
}
ask() { curl -s -m 2 -w '\n' "http://127.0.0.1:$1/" || true; }
asked=()
start first "$first" "$stats1" 0 "$metrics1"
until grep -q ^ready "$folder/first/output"; do kill -0 "${pids[0]}" && sleep 0.5; done
start second "$second" "$stats2" 20 "$metrics2"
until grep -q ^ready "$folder/second/output"; do
    kill -0 "${pids[1]}"
    for _ in {1..16}; do ask "$second" & asked+=($!); done  # at once, over 16 connections
    wait "${asked[@]}"
    asked=()
done > "$folder/before"
sleep 6
echo "before the second application runs:"; grep -oE '"(first|second)"' "$folder/before" | sort | uniq -c
echo "afterwards: $(ask "$second")"
grep -q '"first"' "$folder/before"
test "$(ask "$second")" = '"second"'
