"""The workflows, played: their `run:` steps in order, in a fresh clone, with the variables that GitHub sets; only GitHub itself is a stand-in."""
import itertools
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mistune
import pandas as pd
import pytest

from madewithml.pr_comment import MARKER
from madewithml.data import stratified_split
from madewithml.schemas import CandidateMetrics, EvaluateResults, PromoteResults

from ..actions import BOT, REPOSITORY, GitHub, Played, github, play, zipped
from ..conftest import ROOT, Run
from .test_serve import Served, serving

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone of the repository")
ROLL_OUT = "Roll out, and see that the service answers with it"
FORK = {"id": 5, "full_name": "eve/classifier", "owner": {"login": "eve"}}


@pytest.fixture
def hub() -> Iterator[GitHub]:
    """GitHub with a pull request from a fork, on which people and a copycat have written."""
    with github() as hub:
        hub.pulls.append({"number": 7, "state": "open", "head": {"sha": "c0ffee" * 6 + "abcd", "ref": "better", "user": {"login": "eve"}, "repo": FORK}})
        hub.comments += [{"id": 1000 + i, "pull": 7, "user": {"login": who}, "body": body, "html_url": ""} for i, (who, body) in enumerate([("bob", "Nice."), ("eve", f"{MARKER}\nmine"), (BOT, "Coverage 90 %")])]
        yield hub


def workflow_run(number: int, conclusion: str = "success", **changes: object) -> dict:
    """The event that a finished run of workloads.yaml sends."""
    run = {"id": 100 + number, "run_number": number, "event": "pull_request", "conclusion": conclusion, "head_sha": "c0ffee" * 6 + "abcd", "head_branch": "better", "head_repository": FORK,
           "html_url": f"https://github.example/team/classifier/actions/runs/{100 + number}"}
    return {"workflow_run": run | changes, "repository": REPOSITORY}


def comment(hub: GitHub, tmp_path: Path, event: dict, repository: Path = ROOT) -> Played:
    return play("comment.yaml", repository, tmp_path / "checkout", hub, event, {"github": {"run_id": 900}})


def results(run: Run) -> dict[str, dict]:
    """The results of a run, with what the gate would have measured."""
    found = {name: run.json(name) for name in ("validate", "train", "evaluate", "predict", "register")}
    judged = EvaluateResults.model_validate(found["evaluate"])
    measured = CandidateMetrics(version=1, run_id=judged.run_id, p50_ms=5, p99_ms=9, size_mb=91, **judged.model_dump(include={"overall", "per_class", "slices", "behavior"}))
    gated = PromoteResults(model_name="m", decision="promoted", by="runner", reason="", dataset_loc="h", dataset_digest="h", policy={}, checks=[], challenger=measured)
    return found | {"promote": gated.model_dump()}


def files(found: dict[str, dict]) -> dict[str, str]:
    return {f"{name}.json": json.dumps(value) for name, value in found.items()}


def ours(hub: GitHub) -> list[dict]:
    return [comment for comment in hub.comments if comment["user"]["login"] == BOT and comment["body"].startswith(MARKER)]


def test_comment_is_made_kept_up_to_date_and_guarded(trained: Run, hub: GitHub, tmp_path: Path) -> None:
    """The first run makes the comment, later ones replace it; a forged artifact changes nothing; nobody else's comment is touched."""
    found = results(trained)
    hub.runs.append({"id": 50, "workflow": "serve.yaml", "branch": "main", "event": "push", "status": "completed"})
    hub.upload(50, "results", zipped(files(found)))
    hub.upload(101, "results", zipped(files(found)))
    done = comment(hub, tmp_path, workflow_run(1))
    assert done.success, done.said
    [made] = ours(hub)
    assert f"**F1 {found['evaluate']['overall']['f1']:.3f}**" in made["body"] and "| main | difference |" in made["body"] and "+0.000" in made["body"]
    assert "would promote" in made["body"] and "c0ffeec0ff" in made["body"] and made["pull"] == 7

    worse = json.loads(json.dumps(found))  # a stranger's figures and texts, of the right schema
    hostile = "@everyone ![x](https://evil.example/x.png) | <script>alert(1)</script> " + MARKER
    worse["evaluate"]["mistakes"] = [{"row": 1, "text": hostile, "label": hostile, "predicted": "`x`", "confidence": 0.9}]
    worse["evaluate"]["overall"]["f1"] = worse["promote"]["challenger"]["overall"]["f1"] = 0.25
    hub.upload(102, "results", zipped(files(worse)))
    assert comment(hub, tmp_path, workflow_run(2)).success
    [updated] = ours(hub)
    assert updated["id"] == made["id"] and "**F1 0.250**" in updated["body"] and "would refuse" in updated["body"] and "| weighted F1 | 0.250 |" in updated["body"]
    html = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])(updated["body"])
    assert re.findall(r"<a [^>]*>", html) == ['<a href="https://github.example/team/classifier/actions/runs/102">']
    assert not re.search(r"<(img|script)|@\w", html) and html.count("<!--") == 1

    before = json.dumps(hub.comments)
    hub.upload(103, "results", zipped(files(found) | {"../../.bashrc": "x"}))
    done = comment(hub, tmp_path, workflow_run(3))
    assert done.outcome["Comment"] == "failure" and "Check failed: The artifact is rejected: it holds '../../.bashrc'" in done.said["Comment"], done.said
    hub.upload(104, "results", zipped(files(found)))
    done = comment(hub, tmp_path, workflow_run(4, head_sha="0" * 40))  # the pull request has moved on
    assert done.success and "nothing to say" in done.said["Comment"], done.said
    assert comment(hub, tmp_path, workflow_run(4, event="push")).outcome == {}
    assert json.dumps(hub.comments) == before

    assert comment(hub, tmp_path, workflow_run(5, "failure")).success  # a run that failed before it had results
    assert ours(hub)[0]["id"] == made["id"] and "runs/105): failure" in ours(hub)[0]["body"] and "no verdict" in ours(hub)[0]["body"]
    assert [one["body"] for one in hub.comments if one["id"] < 1003] == ["Nice.", f"{MARKER}\nmine", "Coverage 90 %"]


class Traffic(threading.Thread):
    """Somebody who asks the service five times a second, all the while; what came back."""

    def __init__(self, service: Served, items: list[dict]) -> None:
        super().__init__(daemon=True)
        self.service, self.items, self.answers, self.ended = service, items, [], threading.Event()

    def run(self) -> None:
        for i in itertools.count():
            if self.ended.wait(0.2):
                return
            try:
                status, body, _ = self.service.ask("/predict/", self.items[i % len(self.items)])
                self.answers.append((status, body["version"] if status == 200 else body))
            except OSError as error:
                self.answers.append((0, str(error)))


@pytest.mark.slow
def test_whole_loop(hub: GitHub, tmp_path: Path) -> None:
    """A merge makes the first champion; a pull request is run and commented; its merge is rolled out, after one whose model the service refuses came back out by itself;
    the traffic drifts, the monitor alarms, the trigger retrains with new rows, and what comes out takes over. Somebody asks all the while, and always gets an answer."""
    origin, checkout, place = tmp_path / "origin", tmp_path / "checkout", tmp_path / "place"
    (place / "new").mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(origin)], check=True)
    rest, first = stratified_split(pd.read_csv(ROOT / "datasets" / "dataset.csv"), 0.2, seed=0)  # a team that has labeled little so far
    first.to_csv(origin / "datasets" / "dataset.csv", index=False)
    gate = origin / "deploy" / "promotion.yaml"
    text = gate.read_text(encoding="utf-8")
    gate.write_text(text.replace("max_new_behavior_failures: 0", "max_new_behavior_failures: 3"), encoding="utf-8")  # what a model of 120 rows passes, it passes by luck
    assert gate.read_text(encoding="utf-8") != text
    subprocess.run(["git", "-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "--quiet", "--all", "--message", "The first rows"], check=True)
    secrets = {"MADEWITHML_SHARED_URI": str(place / "shared"), "MADEWITHML_TRACKING_URI": f"sqlite:///{place}/mlflow.db"}

    def merge(number: int, options: str, url: str = "", before: dict | None = None) -> Played:
        contexts = {"github": {"sha": f"{number:040x}", "run_id": number}, "secrets": secrets, "vars": {"WORKLOADS_OPTIONS": options, "MADEWITHML_URL": url}}
        played = play("serve.yaml", origin, checkout, hub, {"repository": REPOSITORY}, contexts, before)
        hub.runs.append({"id": number, "workflow": "serve.yaml", "branch": "main", "event": "push", "status": "completed"})
        return played

    done = merge(1, "--num-epochs 1 --num-samples 150")
    assert done.success and done.outcome[ROLL_OUT] == "skipped", done.said

    known = pd.read_csv(ROOT / "datasets" / "holdout.csv").fillna("")[["title", "description"]].to_dict("records")
    strange = pd.read_csv(ROOT / "datasets" / "offtopic.csv").fillna("")
    options = ("--config", '{"poll_interval_s": 0.5, "log_flush_interval_s": 1, "log_text": "keep"}', "--log-dir", str(place / "log"))
    with serving(Run(place), *options, **secrets, MADEWITHML_STORAGE_DIR=str(place / "storage"), PYTHONPATH=str(origin)) as service:
        traffic = Traffic(service, known)
        traffic.start()

        def answers_with(version: int) -> None:
            about = service.ask("/version")[1]
            assert about["version"] == version and about["rejected"] is None, about

        answers_with(1)
        contexts = {"github": {"run_id": 101, "event_name": "pull_request"}, "vars": {"WORKLOADS_OPTIONS": "--num-epochs 2"}}  # from a fork: no secret
        done = play("workloads.yaml", origin, checkout, hub, {"pull_request": {"number": 7}, "repository": REPOSITORY}, contexts)
        assert done.success and done.outcome["Run on the cluster"] == "skipped" and MARKER in done.summary, done.said
        assert {artifact["name"] for artifact in hub.artifacts if artifact["run"] == 101} == {"results", "report"}
        assert comment(hub, tmp_path, workflow_run(1), origin).success
        [made] = ours(hub)
        assert "| main | difference |" in made["body"] and "would promote" in made["body"] and "against `main`'s champion" in made["body"], made["body"]
        answers_with(1)

        def unseal() -> None:
            """The gate can read the model as before; the service takes nothing that is not sealed."""
            run_id = json.loads((checkout / "results" / "main" / "train.json").read_text(encoding="utf-8"))["run_id"]
            [seal] = place.rglob(f"{run_id}/artifacts/checkpoint/digests.json")
            seal.unlink()

        done = merge(2, "--num-epochs 2", service.url, {"Promote through the gate": unseal})
        assert done.outcome["Promote through the gate"] == "success", done.said
        assert done.outcome[ROLL_OUT] == "failure" and "version 1 answers; rejected" in done.said[ROLL_OUT], done.said
        assert done.outcome["Roll back"] == "success" and not done.success, done.said
        answers_with(1)
        done = merge(3, "--num-epochs 2", service.url)
        assert done.success and done.outcome["Roll back"] == "skipped", done.said
        answers_with(3)

        def look() -> Played:
            contexts = {"secrets": secrets, "vars": {"MADEWITHML_LOG_DIR": str(place / "log"), "MADEWITHML_NEW_DATA": str(place / "new")}}
            return play("monitor.yaml", origin, checkout, hub, {}, contexts)

        def window(items: list[dict]) -> None:
            traffic.items = items
            for begin in (0, 100):
                assert service.ask("/predict/", items[begin:begin + 100])[0] == 200
            time.sleep(3)  # written once a second

        window(known[:200])
        done = look()
        assert done.success and '"decision": "nothing"' in done.said["Decide"], done.said
        drifted = [item for i in range(60) for item in (strange.iloc[i].to_dict(), known[2 * i], known[2 * i + 1])] + known[300:320]  # 30 % are of a topic that nobody has seen
        window(drifted)
        done = look()
        assert done.outcome["Look"] == "failure" and '"decision": "nothing"' in done.said["Decide"] and "1 window(s) in a row" in done.said["Decide"], done.said
        new = pd.concat([rest.sample(600, random_state=0), strange.head(40).assign(id=range(100_000, 100_040), created_on="2026-01-01", tag="other")])
        new.to_csv(place / "new" / "labeled.csv", index=False)
        window(drifted)
        time.sleep(3)  # the file has settled
        done = look()
        assert done.outcome["Look"] == "failure" and done.outcome["Decide"] == "success", done.said
        for said in ("2 window(s) in a row", '"decision": "retrain"', "drift", "Version 4 is the champion"):
            assert said in done.said["Decide"], done.said["Decide"]
        time.sleep(5)
        answers_with(4)
        traffic.ended.set()
        traffic.join()
        after = [one["prediction"] for one in service.ask("/predict/", strange.tail(20).to_dict("records"))[1]["results"]]
    assert {status for status, _ in traffic.answers} == {200}, [answer for answer in traffic.answers if answer[0] != 200][:5]
    assert [version for version, _ in itertools.groupby(version for _, version in traffic.answers)] == [1, 3, 4]
    assert after.count("other") >= 15, after  # it has learned the new topic from the others' labels
    print(f"{len(traffic.answers)} requests, all answered, by versions 1, 3 and 4")
