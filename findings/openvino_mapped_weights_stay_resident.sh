#!/usr/bin/env bash
# openvino 2026.4.1 on a CPU under Linux: `Core.read_model` maps the file of the weights (.bin) into
# memory, `compile_model` makes the copies that it computes with, in a layout of its own.
#
# An informed guess: after compilation and a first inference, with the `Model` deleted, the process
# holds the weights once; the mapping is gone or its pages are not resident. Seen: the mapping lives
# as long as the compiled model, with all pages resident, so that the weights count twice, also
# toward a container's limit. The pages are never read again: after madvise(MADV_DONTNEED) on the
# mapping the resident size falls by a copy, and inference gives the same result without reading it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "openvino==2026.4.1" "numpy==2.4.6"
cat > "$folder/measure.py" <<'PY'
import ctypes
import gc
import sys

import numpy as np
import openvino as ov
from openvino import opset13 as ops

path = sys.argv[1]
SIZE = 5000  # the matrix has 100 MB
if sys.argv[2] == "save":
    values = np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32)
    rows = ops.parameter([-1, SIZE], np.float32)
    product = ops.matmul(rows, ops.constant(values), False, True)
    ov.save_model(ov.Model([product], [rows]), path, compress_to_fp16=False)
    sys.exit()


def mapped():
    """Resident megabytes of the mapped file of the weights."""
    total, counts = 0, False
    for line in open("/proc/self/smaps"):
        if line.split()[0][-1] != ":":  # the first line of a mapping, which names its file
            counts = line.rstrip().endswith(".bin")
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total / 1000


def own():
    """Resident megabytes that belong to no file."""
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000


core = ov.Core()
before = own()
model = core.read_model(path)
options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
compiled = core.compile_model(model, "CPU", options)
ones = np.ones((2, SIZE), dtype=np.float32)
expected = compiled([ones])[0].copy()
del model
gc.collect()
held = mapped(), own() - before
print(f"weights 100 MB; mapped and resident {held[0]:.0f} MB, own memory {held[1]:.0f} MB")
assert held[0] > 90 and held[1] > 90, held
madvise = ctypes.CDLL(None).madvise
for line in open("/proc/self/maps"):
    if line.rstrip().endswith(".bin"):
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        assert madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 4) == 0
assert np.array_equal(compiled([ones])[0], expected)
left = mapped()
print(f"after MADV_DONTNEED and another inference: mapped and resident {left:.0f} MB")
assert left < 5, left
PY
"$folder/venv/bin/python" "$folder/measure.py" "$folder/model.xml" save
"$folder/venv/bin/python" "$folder/measure.py" "$folder/model.xml" measure
echo "as found"
