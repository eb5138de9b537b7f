"""Promotions of registered versions: through the gate, forced, rolled back, and two at once."""
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from madewithml.config import CheckFailed, UserError, bundled_dir
from madewithml.data import build_texts, read_labeled_table
from madewithml.gate import require_promotion
from madewithml.models import (
    build_classifier,
    load_tokenizer,
    predict_proba,
    save_classifier,
    set_seed,
)
from madewithml.promotion import promote_model
from madewithml.registry import get_aliases, resolve_alias, rollback
from madewithml.tracking import CHECKPOINT, get_or_create_experiment, mlflow_client
from madewithml.utils import temporary_storage

POLICY = {"min_group_rows": 5, "max_p99_ms": 10000, "max_p99_latency_ratio": 100,
          "max_p50_latency_ratio": 100}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A storage with an empty registered model `demo`, a small holdout and a lenient policy."""
    with temporary_storage() as folder:
        rows = read_labeled_table(bundled_dir("datasets") / "holdout.csv", 1)
        rows.groupby("tag").head(5).to_csv(folder / "rows.csv", index=False)
        (folder / "policy.yaml").write_text(json.dumps(POLICY))
        mlflow_client().create_registered_model("demo")
        yield folder


def build_untrained(labels: tuple[str, ...]):
    """Always the same random weights, with the labels named in this order."""
    set_seed(0)
    return build_classifier("embedded", {label: i for i, label in enumerate(labels)}).eval()


def sort_label_orders(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """Orders of the labels, from the one with the fewest correct predictions to the most."""
    labels = sorted(rows["tag"].unique())
    model, tokenizer = build_untrained(tuple(labels)), load_tokenizer("embedded")
    ids = predict_proba(model, tokenizer, build_texts(rows), "fp32").argmax(1)
    truth = rows["tag"].to_numpy()
    return sorted(itertools.permutations(labels),
                  key=lambda order: np.mean([order[i] for i in ids] == truth))


def register_challenger(labels: tuple[str, ...], folder: Path) -> None:
    client = mlflow_client()
    run = client.create_run(get_or_create_experiment("demo")).info
    checkpoint = save_classifier(build_untrained(labels), load_tokenizer("embedded"),
                                 folder / run.run_id, 64)
    client.log_artifacts(run.run_id, checkpoint, CHECKPOINT)
    version = client.create_model_version("demo", run.artifact_uri, run.run_id).version
    client.set_registered_model_alias("demo", "challenger", version)


def test_promote_reject_force_roll_back_and_race(folder: Path) -> None:
    """A first champion, a worse challenger that is rejected and forced, a rollback, and a race."""
    promote = partial(promote_model, "demo", folder / "rows.csv", folder / "policy.yaml",
                      precision="fp32")
    worst, *_, best = sort_label_orders(read_labeled_table(folder / "rows.csv", 1))
    with pytest.raises(UserError, match="'demo' has no challenger"):
        promote()
    register_challenger(best, folder)
    assert promote().decision == "promoted"
    assert get_aliases("demo") == {"champion": 1}

    register_challenger(worst, folder)
    rejected = promote()
    assert rejected.decision == "rejected" and rejected.champion.version == 1
    assert get_aliases("demo") == {"champion": 1, "challenger": 2}
    with pytest.raises(CheckFailed, match="weighted F1"):
        require_promotion(rejected)
    with pytest.raises(UserError, match="needs --reason"):
        promote(force=True)
    forced = promote(force=True, reason="the holdout is stale")
    assert forced.decision == "forced"
    assert get_aliases("demo") == {"champion": 2, "previous": 1}
    tag = json.loads(mlflow_client().get_model_version("demo", "2").tags["promotion"])
    assert (tag["decision"], tag["reason"]) == ("forced", "the holdout is stale")
    assert len(tag["checks"]) == len(forced.checks)

    assert rollback("complaints", "demo") == {"champion": 1, "previous": 2}
    assert resolve_alias("champion", "demo")[1] == forced.champion.run_id

    register_challenger(worst, folder)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(promote, force=True, reason="race") for _ in range(2)]
    errors = [future.exception() for future in futures if future.exception()]
    assert [type(error) for error in errors] == [CheckFailed]
    assert "changed meanwhile: champion is now version 3" in str(errors[0])
    assert get_aliases("demo") == {"champion": 3, "previous": 1}
