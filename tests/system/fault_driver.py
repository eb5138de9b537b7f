"""A training or a batch prediction that kills a process at a given point of its way: run by `test_faults.py`, one process per trial.

The fault is planted in the worker by replacing functions there, so the package carries no switch for it. It strikes once: whoever comes
second finds the mark in the trial's folder.
"""
import argparse
import json
import os
import signal
import time
from pathlib import Path

import madewithml.predict as predict
import madewithml.train as train
from madewithml.config import TrainConfig


def strike(folder: str, victim: str, driver: int) -> None:
    """Kills the victim, once, and notes when."""
    try:
        with open(f"{folder}/struck", "x") as file:
            file.write(str(time.time()))
    except FileExistsError:
        return
    # a worker's parent is its node's raylet
    os.kill({"worker": os.getpid(), "node": os.getppid(), "driver": driver}[victim], signal.SIGKILL)
    time.sleep(60)  # the end arrives from outside: a node's workers die with it, the driver's with the driver


def plant(folder: str, victim: str, point: str, driver: int) -> None:
    """Replaces what the point names in this worker, and notes each step."""
    import ray.train.v2._internal.execution.storage as ray_storage

    import madewithml.train_worker as worker

    kind, _, number = point.partition(":")
    step, seal, copy = worker.Events.step, worker.seal, ray_storage._pyarrow_fs_copy_files

    def noted_step(self, epoch: int, now: int, steps: int) -> None:
        if now == 1 or kind == "step":
            with open(f"{folder}/steps", "a") as file:
                file.write(json.dumps({"epoch": epoch, "step": now, "time": time.time()}) + "\n")
        step(self, epoch, now, steps)
        if kind == "step" and (epoch - 1) * steps + now == int(number):
            strike(folder, victim, driver)

    def broken_seal(path: str) -> None:
        if kind == "save" and worker.read_history(path)[-1].epoch == int(number):
            strike(folder, victim, driver)
        seal(path)

    def broken_copy(source, destination, source_filesystem=None, destination_filesystem=None, **kwargs):
        if kind == "upload" and (Path(source) / worker.HISTORY).is_file() and worker.read_history(source)[-1].epoch == int(number):
            half = Path(source) / worker.CLASSIFIER / "model.safetensors"
            with half.open("rb") as file:
                part = file.read(half.stat().st_size // 2)
            destination_filesystem.create_dir(destination, recursive=True)
            with destination_filesystem.open_output_stream(f"{destination}/model.safetensors") as out:
                out.write(part)
            strike(folder, victim, driver)
        return copy(source, destination, source_filesystem=source_filesystem, destination_filesystem=destination_filesystem, **kwargs)

    worker.Events.step, worker.seal, ray_storage._pyarrow_fs_copy_files = noted_step, broken_seal, broken_copy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--victim", default="nobody")
    parser.add_argument("--point", default="none:0")
    parser.add_argument("--dataset")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--classifier", help="predict with it instead of training")
    parser.add_argument("--output")
    args = parser.parse_args()
    folder, victim, point, driver = args.folder, args.victim, args.point, os.getpid()

    if args.classifier:
        call = predict._Actor.__call__

        def struck_call(self, table):
            self.blocks = getattr(self, "blocks", 0) + 1
            if self.blocks == int(point.partition(":")[2]):
                strike(folder, victim, driver)
            return call(self, table)

        predict._Actor = type("_Actor", (predict._Actor,), {"__call__": struck_call})  # pickled by value: it is nobody's module
        predict._Actor.__module__ = "__main__"
        results = predict.predict_with(args.classifier, "faults", args.dataset, args.output)
    else:
        start = train.start_worker

        def planted(loop: dict) -> None:
            plant(folder, victim, point, driver)
            start(loop)

        train.start_worker = planted
        results = train.train_model(args.dataset, "faults", TrainConfig(num_epochs=args.epochs), num_workers=args.workers, cpu_per_worker=1, num_samples=args.samples)
    Path(f"{folder}/results.json").write_text(results.model_dump_json())


if __name__ == "__main__":
    main()
