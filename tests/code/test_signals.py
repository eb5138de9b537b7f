"""What signals do. Only the main thread may handle them, and nbdev runs cells in another one."""
import os
import signal
import subprocess
import sys

import pytest

DROPPED_ENGINE = """
import signal
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from madewithml.graph import compile_graph, export_graph
from madewithml.models import build_classifier

model = build_classifier("embedded", {"a": 0, "b": 1}).eval().requires_grad_(False)
forwards = {name: compile_graph(export_graph(model), name) for name in ("fp32", "bf16")}
for forward in forwards.values():
    forward(np.full((2, 8), 200), np.ones((2, 8), int))
with ThreadPoolExecutor(1) as other:
    other.submit(forwards.clear).result()
signal.signal(signal.SIGUSR1, lambda *_: print("received"))
signal.raise_signal(signal.SIGUSR1)
"""


def test_a_signal_is_received_after_another_thread_dropped_an_engine() -> None:
    """OpenVINO's signal stack belongs to the thread that loaded its plugin."""
    done = subprocess.run([sys.executable, "-c", DROPPED_ENGINE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "received\n"), done.stderr


def test_run_forever_survives_errors_until_a_signal() -> None:
    """Only an error of the first turn ends the loop; a signal to end does so as Ctrl-C would."""
    from madewithml.config import CheckFailed, UserError
    from madewithml.retrain import run_forever
    before = signal.getsignal(signal.SIGTERM)
    turns = []

    def turn() -> None:
        turns.append(1)
        if len(turns) == 2:
            raise UserError("the bucket is away.")
        if len(turns) == 3:
            raise CheckFailed("rejected.")
        if len(turns) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def wrong() -> None:
        raise UserError("no such directory.")

    with pytest.raises(KeyboardInterrupt):
        run_forever(turn, 0.01)
    assert len(turns) == 4
    with pytest.raises(UserError, match="no such directory"):
        run_forever(wrong, 0.01)
    assert signal.getsignal(signal.SIGTERM) is before
