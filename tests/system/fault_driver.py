"""A training or batch prediction that kills a process at a given point of its progress.

`test_faults.py` runs it, one process per trial. The fault is injected in the worker by replacing
functions there, so the package has no switch for it.
"""
import json
import os
import signal
import time
from pathlib import Path

import ray.train.v2._internal.execution.storage as ray_storage
import typer

import madewithml.predict as predict
import madewithml.train as train
from madewithml.config import TrainOptions


def kill_once(folder: str, victim: str, driver: int) -> None:
    """Kills the victim and notes when; does nothing if the trial's folder has the note."""
    try:
        with open(f"{folder}/struck", "x") as file:
            file.write(str(time.time()))
    except FileExistsError:
        return
    # A worker's parent is its node's raylet.
    os.kill({"worker": os.getpid(), "node": os.getppid(), "driver": driver}[victim], signal.SIGKILL)
    time.sleep(60)  # the end arrives from outside: workers end with their node or their driver


def inject_fault(folder: str, victim: str, point: str, driver: int) -> None:
    """Replaces what the point names in this worker, and notes each step."""
    import madewithml.train_worker as worker

    kind, _, number = point.partition(":")
    step, seal = worker.ProgressReporter.step, worker.write_checksums
    copy = ray_storage._pyarrow_fs_copy_files

    def is_due(at: str, checkpoint: str | Path) -> bool:
        return kind == at and worker.read_history(checkpoint)[-1].epoch == int(number)

    def noted_step(self, epoch: int, now: int, steps: int) -> None:
        if now == 1 or kind == "step":
            with open(f"{folder}/steps", "a") as file:
                file.write(json.dumps({"epoch": epoch, "step": now, "time": time.time()}) + "\n")
        step(self, epoch, now, steps)
        if kind == "step" and (epoch - 1) * steps + now == int(number):
            kill_once(folder, victim, driver)

    def unfinished_seal(path: str | Path) -> None:
        if is_due("save", path):
            kill_once(folder, victim, driver)
        seal(path)

    def unfinished_copy(source: str, destination: str, **filesystems) -> None:
        if (Path(source) / worker.HISTORY).is_file() and is_due("upload", source):
            content = (Path(source) / worker.CLASSIFIER / "model.safetensors").read_bytes()
            storage = filesystems["destination_filesystem"]
            storage.create_dir(destination, recursive=True)
            with storage.open_output_stream(f"{destination}/model.safetensors") as file:
                file.write(content[:len(content) // 2])
            kill_once(folder, victim, driver)
        copy(source, destination, **filesystems)

    worker.ProgressReporter.step, worker.write_checksums = noted_step, unfinished_seal
    ray_storage._pyarrow_fs_copy_files = unfinished_copy


def main(folder: str = "", victim: str = "", point: str = "none:0", dataset: str = "",
         workers: int = 1, epochs: int = 3, samples: int = 160, classifier: str = "",
         output: str = "") -> None:
    """Trains, or predicts with `classifier`, and writes the results into the trial's folder."""
    driver = os.getpid()
    start = train.worker_entrypoint
    predict_shard, commit = predict._ShardPredictor.predict, predict.ShardStore.commit

    def start_with_fault(loop: dict) -> None:
        inject_fault(folder, victim, point, driver)
        start(loop)

    def predict_with_fault(self, files, number, rows):
        self.shards = getattr(self, "shards", 0) + 1
        if point == f"shard:{self.shards}":
            kill_once(folder, victim, driver)
        return predict_shard(self, files, number, rows)

    def commit_with_fault(self, number, rows):
        commit(self, number, rows)
        if point == f"commit:{len(list(self.folder.glob('[0-9]*')))}":
            kill_once(folder, victim, driver)

    if classifier:
        # In __main__, so that it is pickled by value.
        faulty = {"predict": predict_with_fault, "__module__": "__main__"}
        predict._ShardPredictor = type("_ShardPredictor", (predict._ShardPredictor,), faulty)
        predict.ShardStore.commit = commit_with_fault
        results = predict.predict_table_from_dir(classifier, "faults", dataset, output)
    else:
        train.worker_entrypoint = start_with_fault
        options = TrainOptions(experiment_name="faults", num_epochs=epochs, num_workers=workers,
                               cpu_per_worker=1, num_samples=samples)
        results = train.train_model(dataset, options)
    Path(f"{folder}/results.json").write_text(results.model_dump_json())


if __name__ == "__main__":
    typer.run(main)
