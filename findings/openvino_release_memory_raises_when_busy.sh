#!/usr/bin/env bash
# openvino 2026.4.1 on a CPU: `CompiledModel.release_memory()` frees the buffers of intermediate
# results; its description says "when possible".
#
# An informed guess: in a server whose threads infer by several requests, it frees what is free at
# the moment, or waits for the requests, and can be called at any time. Seen: while a request is
# computed, on one of two streams, it raises a RuntimeError ("busy state"). A service needs a moment
# without a request, or has to catch the error and try again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "openvino==2026.4.1" "numpy==2.4.6"
cat > "$folder/release.py" <<'PY'
import time

import numpy as np
import openvino as ov
from openvino import opset13 as ops

SIZE = 2048
values = np.full((SIZE, SIZE), 1 / SIZE, dtype=np.float32)
node = rows = ops.parameter([-1, SIZE], np.float32)
for _ in range(16):
    node = ops.relu(ops.matmul(node, ops.constant(values), False, True))
options = {"INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 2}
compiled = ov.Core().compile_model(ov.Model([node], [rows]), "CPU", options)
ones = np.ones((4096, SIZE), dtype=np.float32)
request = compiled.create_infer_request()
request.infer([ones])
compiled.release_memory()
print("idle: released")
request.start_async([ones])
time.sleep(0.2)  # it takes seconds
try:
    compiled.release_memory()
except RuntimeError as error:
    assert "busy state" in str(error), error
    print("one request on one of two streams:", str(error).strip().splitlines()[-1][:77])
else:
    raise SystemExit("it was released while a request was computed")
request.wait()
compiled.release_memory()
assert np.allclose(request.results[0], 1, atol=1e-3)
print("idle again: released")
PY
"$folder/venv/bin/python" "$folder/release.py"
echo "as found"
