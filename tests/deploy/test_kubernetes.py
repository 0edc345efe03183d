"""The manifests: what kustomize makes of them is what Kubernetes, kvernd and the connector take, and its parts agree."""

import ast
import copy
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import jsonschema
import kubernetes_validate
import pytest
import yaml

from clean_root import Container
from daemon import binary
from engine import BUILD, ROOT
from image import DaemonContainer, image_environment, user
from manifests import (
    FOLDER,
    NAMES,
    containers,
    daemon_config,
    daemons,
    engines,
    objects,
    of_kind,
    size,
    source,
    transfer_config,
)

sys.path.insert(0, str(BUILD / "python"))
from kvern.config import Options  # noqa: E402

# The oldest that knows sidecars and the sleep before a stop, and the newest that the validator knows.
VERSIONS = ("1.30", kubernetes_validate.latest_version())

# The operator's resources are not among Kubernetes' own schemas.
OPERATOR = {
    kind: json.loads((ROOT / f"tests/deploy/{kind.lower()}.schema.json").read_text())
    for kind in ("PodMonitor", "PrometheusRule")
}

# Beside the tier: what the guide says under "Sizes".
WORKERS = 8
PROCESS_BYTES = 2 << 30
GIB = 1 << 30

each_manifest = pytest.mark.parametrize("name", NAMES)


def validate(each: dict, version: str) -> None:
    if each["kind"] in OPERATOR:
        jsonschema.validate(each, OPERATOR[each["kind"]])
    else:
        kubernetes_validate.validate(each, version, strict=True)


# ---- rendering and schemas


def test_every_overlay_and_example_is_rendered():
    folders = [path.parent.name for path in FOLDER.glob("*/*/kustomization.yaml") if path.parent.parent.name != "components"]
    assert sorted(folders) == NAMES


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here: rendered/ is taken as it is")
@each_manifest
def test_the_rendered_file_is_what_kustomize_makes(name):
    made = subprocess.run(["kubectl", "kustomize", source(name)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout == (FOLDER / f"rendered/{name}.yaml").read_text(), "run deploy/kubernetes/render.sh"


@pytest.mark.parametrize("version", VERSIONS)
@each_manifest
def test_kubernetes_knows_every_field(name, version):
    for each in objects(name):
        validate(each, version)


@pytest.mark.parametrize(
    "damage",
    [
        lambda spec: spec["containers"][0].update(livenesProbe={}),
        lambda spec: spec["containers"][0]["ports"][0].update(containerPort="9464"),
        lambda spec: spec["containers"][0].pop("name"),
    ],
    ids=["an unknown field", "a text for a port", "a container without a name"],
)
def test_a_broken_manifest_is_refused(damage):
    (each,) = of_kind("daemonset", "DaemonSet")
    broken = copy.deepcopy(each)
    damage(broken["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken, VERSIONS[-1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda endpoint: endpoint.update(targetport=9464),
        lambda endpoint: endpoint.update(interval="often"),
        lambda endpoint: endpoint["relabelings"][0].update(action="rename"),
        lambda endpoint: endpoint["relabelings"][0].update(sourceLabels="job"),
    ],
    ids=["an unknown field", "an interval that is none", "an unknown action", "a text for a list"],
)
def test_a_broken_pod_monitor_is_refused(damage):
    each = copy.deepcopy(of_kind("single-node", "PodMonitor")[0])
    damage(each["spec"]["podMetricsEndpoints"][0])
    with pytest.raises(jsonschema.ValidationError):
        validate(each, VERSIONS[-1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda rule: rule.update(expression="up == 0"),
        lambda rule: rule.update(labels=["critical"]),
        lambda rule: rule.pop("expr"),
    ],
    ids=["an unknown field", "a list for labels", "a rule without an expression"],
)
def test_a_broken_rule_is_refused(damage):
    (each,) = copy.deepcopy(of_kind("single-node", "PrometheusRule"))
    damage(each["spec"]["groups"][-1]["rules"][0])
    with pytest.raises(jsonschema.ValidationError):
        validate(each, VERSIONS[-1])


def test_the_operators_rules_are_those_of_deploy_prometheus():
    files = [yaml.safe_load((ROOT / f"deploy/prometheus/{name}.yaml").read_text()) for name in ("rules", "alerts")]
    written = yaml.safe_load((FOLDER / "components/monitoring/rules.yaml").read_text())
    groups = [group for file in files for group in file["groups"]]
    assert written["spec"] == {"groups": groups}, "run deploy/kubernetes/render.sh"
    (rendered,) = of_kind("single-node", "PrometheusRule")
    assert rendered["spec"] == written["spec"]


# ---- what kvernd and the connector take


def check_config(path: pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run([binary("kvernd"), "--check-config", path], capture_output=True, text=True)


@each_manifest
def test_kvernd_takes_every_config_file(name, tmp_path):
    assert daemons(name)
    for daemon in daemons(name):
        text, _ = daemon_config(name, daemon)
        (tmp_path / "kvernd.toml").write_text(text)
        done = check_config(tmp_path / "kvernd.toml")
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_key_in_a_config_file_is_refused_by_name(tmp_path):
    text, _ = daemon_config("daemonset", daemons("daemonset")[0])
    (tmp_path / "kvernd.toml").write_text(text.replace("dram_bytes", "dram_byte"))
    done = check_config(tmp_path / "kvernd.toml")
    assert done.returncode != 0 and "dram_byte" in done.stderr


@each_manifest
def test_the_connector_and_vllm_take_every_transfer_config(name):
    package = pathlib.Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    tree = ast.parse((package / "config/kv_transfer.py").read_text())  # read, not imported: that takes long
    (known,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "KVTransferConfig"]
    fields = {node.target.id for node in known.body if isinstance(node, ast.AnnAssign)}
    for engine in engines(name):
        transfer = transfer_config(engine)
        assert set(transfer) <= fields
        assert (transfer["kv_connector"], transfer["kv_connector_module_path"]) == ("KvernConnector", "kvern.vllm")
        assert transfer["kv_role"] in ("kv_both", "kv_producer", "kv_consumer")
        assert transfer["kv_load_failure_policy"] == "recompute"
        options = Options.from_extra_config(transfer["kv_connector_extra_config"])
        assert options.address.startswith("unix://")
        # Block hashes begin alike, or engines would not share.
        assert {"name": "PYTHONHASHSEED", "value": "0"} in engine.spec["env"]


# ---- parts agree


@each_manifest
def test_the_socket_is_in_a_volume_that_daemon_and_engines_share(name):
    (daemon,) = daemons(name)
    socket = daemon_config(name, daemon)[1]["server"]["socket"]
    mount, volume = daemon.mount(os.path.dirname(socket))
    assert not mount.get("readOnly")
    for engine in engines(name):
        address = transfer_config(engine)["kv_connector_extra_config"]["kvern.address"]
        assert address == f"unix://{socket}"
        engine_mount, engine_volume = engine.mount(os.path.dirname(socket))
        assert engine_mount["mountPath"] == mount["mountPath"] and engine_mount["readOnly"]
        assert engine_volume == volume and ("hostPath" in volume or engine.workload == daemon.workload)
        # The group of the socket.
        assert engine.security()["runAsGroup"] == daemon.security()["runAsGroup"]


@functools.cache
def defaults() -> dict:
    dump = [binary("kvernd"), "--dump-config"]
    return tomllib.loads(subprocess.run(dump, capture_output=True, text=True, check=True).stdout)


def volume_bytes(dram: int) -> int:
    """The tier and a twentieth for its index, in whole GiB."""
    return -(-dram * 21 // 20 // GIB) * GIB


def memory_bytes(config: dict) -> int:
    compact = {**defaults()["compact"], **config.get("compact", {})}
    jobs = (compact["threads"] + 1) * size(str(compact["job_bytes"]))
    return volume_bytes(size(config["store"]["dram_bytes"])) + WORKERS * Options().staging + jobs + PROCESS_BYTES


@each_manifest
def test_memory_is_large_enough_for_the_tier(name):
    (daemon,) = daemons(name)
    config = daemon_config(name, daemon)[1]
    _, volume = daemon.mount(config["server"]["run_dir"])
    if "emptyDir" in volume:
        assert volume["emptyDir"]["medium"] == "Memory"
        assert size(volume["emptyDir"]["sizeLimit"]) == volume_bytes(size(config["store"]["dram_bytes"]))
    else:
        assert volume["hostPath"]["path"].startswith("/dev/shm/")
    resources = daemon.spec["resources"]
    assert size(resources["limits"]["memory"]) == memory_bytes(config)
    assert resources["requests"]["memory"] == resources["limits"]["memory"]  # what is reserved at the start is needed


@each_manifest
def test_files_and_secrets_that_kvernd_reads_are_mounted(name):
    (daemon,) = daemons(name)
    config = daemon_config(name, daemon)[1]
    for section in config.values():
        for key, value in section.items():
            if key.endswith("_file"):
                mount, volume = daemon.mount(value)
                assert "secret" in volume and mount["readOnly"], value
    if files := config.get("nvme", {}).get("files"):
        mount, volume = daemon.mount(files)
        assert not mount.get("readOnly") and "hostPath" in volume


@each_manifest
def test_ports_and_probes_agree(name):
    for container in containers(name):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container.spec:
                get = container.spec[probe]["httpGet"]
                known = {"kvernd": ("/healthz", "/readyz"), "vllm": ("/health",)}[container.name]
                assert get["path"] in known and container.port(get["port"])
    (daemon,) = daemons(name)
    port = int(daemon_config(name, daemon)[1]["metrics"]["listen"].rsplit(":", 1)[1])
    assert daemon.port("kvern-metrics") == port
    for engine in engines(name):
        assert f"--port={engine.port('http')}" in engine.spec["args"]


def selects(selector: dict, labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", [])
    )


@each_manifest
def test_selectors_find_their_pods(name):
    every = containers(name)
    for workload in of_kind(name, "Deployment", "DaemonSet"):
        assert selects(workload["spec"]["selector"], workload["spec"]["template"]["metadata"]["labels"])
        pod = workload["spec"]["template"]
        for constraint in pod["spec"].get("topologySpreadConstraints", []):
            assert selects(constraint["labelSelector"], pod["metadata"]["labels"])
    for service in of_kind(name, "Service"):
        found = [each for each in every if selects({"matchLabels": service["spec"]["selector"]}, each.pod_labels)]
        for port in service["spec"]["ports"]:
            assert any(each.port(port["targetPort"]) for each in found if each.name == "vllm")
    for budget in of_kind(name, "PodDisruptionBudget"):
        assert any(selects(budget["spec"]["selector"], each.pod_labels) for each in every)
        assert budget["spec"]["maxUnavailable"] == 1 and "minAvailable" not in budget["spec"]  # or a drain is blocked
    for policy in of_kind(name, "NetworkPolicy"):
        assert any(selects(policy["spec"]["podSelector"], each.pod_labels) for each in every)
    for monitor in of_kind(name, "PodMonitor"):
        found = [each for each in every if selects(monitor["spec"]["selector"], each.pod_labels)]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert any(
                port["name"] == endpoint["port"] for each in found for port in each.spec.get("ports", [])
            ), monitor["metadata"]["name"]


@each_manifest
def test_policies_let_scrapes_in_and_remote_tiers_out(name):
    (daemon,) = daemons(name)
    config = daemon_config(name, daemon)[1]
    mine = [each["spec"] for each in of_kind(name, "NetworkPolicy") if selects(each["spec"]["podSelector"], daemon.pod_labels)]
    into = {port["port"] for spec in mine for rule in spec.get("ingress", []) for port in rule["ports"]}
    assert daemon.port("kvern-metrics") in into
    if any("Egress" in spec["policyTypes"] for spec in mine):
        out = {port["port"] for spec in mine for rule in spec.get("egress", []) for port in rule["ports"]}
        for node in filter(None, config.get("redis", {}).get("nodes", "").split(",")):
            assert int(node.rsplit(":", 1)[1]) in out


def test_policies_of_components_are_for_the_daemonsets_pods():
    (daemon,) = daemons("daemonset")
    opened = {}
    for path in FOLDER.glob("components/*/networkpolicy.yaml"):
        spec = yaml.safe_load(path.read_text())["spec"]
        assert spec["policyTypes"] == ["Egress"] and selects(spec["podSelector"], daemon.pod_labels)
        opened[path.parent.name] = {port["port"] for rule in spec["egress"] for port in rule["ports"]}
    assert opened == {"remote-tiers": {6379, 443}, "tracing": {4318}}


def test_jobs_are_named_as_the_rules_expect():
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yaml").read_text())
    expected = {job["job_name"]: job.get("metric_relabel_configs", []) for job in prometheus["scrape_configs"]}
    for monitor in of_kind("single-node", "PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        (job,) = [rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job"]
        renamed = [(rule["regex"], rule["replacement"]) for rule in endpoint.get("metricRelabelings", [])]
        assert renamed == [(rule["regex"], rule["replacement"]) for rule in expected[job]]


def test_targets_are_named_by_their_pods():
    for monitor in of_kind("single-node", "PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        (names,) = [rule["sourceLabels"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "instance"]
        assert names == ["__meta_kubernetes_pod_name"]


@each_manifest
def test_an_engine_gets_a_gpu_and_a_model_without_a_gate(name):
    for engine in engines(name):
        assert engine.spec["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in engine.pod["tolerations"]
        assert engine.spec["args"][0] == "Qwen/Qwen2.5-7B-Instruct"
        (token,) = [each for each in engine.spec["env"] if each["name"] == "HF_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"]["optional"] is True  # a pod waits for ever for one that must be there


def test_a_node_with_a_gpu_for_each_engine_can_be_drained_and_rolled():
    for name in ("single-node", "two-engines"):
        (engine,) = engines(name)
        strategy = engine.workload["spec"]["strategy"]["rollingUpdate"]
        assert (strategy["maxSurge"], strategy["maxUnavailable"]) == (0, 1), name
    for each in NAMES:
        for workload in of_kind(each, "Deployment"):
            affinity = workload["spec"]["template"]["spec"].get("affinity", {}).get("podAffinity", {})
            # A condition would bind a new engine to the node that is being drained.
            assert "requiredDuringSchedulingIgnoredDuringExecution" not in affinity, each
    (pod,) = [engine.pod for engine in engines("two-engines")]
    (together,) = pod["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert together["weight"] == 100 and together["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
    assert selects(together["podAffinityTerm"]["labelSelector"], engines("two-engines")[0].pod_labels)


@each_manifest
def test_a_pod_waits_longer_than_kvernd_drains(name):
    (daemon,) = daemons(name)
    drain = {**defaults()["server"], **daemon_config(name, daemon)[1]["server"]}["drain_timeout_ms"]
    before = sum(
        engine.spec["lifecycle"]["preStop"]["sleep"]["seconds"]
        for engine in engines(name)
        if engine.workload == daemon.workload
    )
    assert daemon.pod["terminationGracePeriodSeconds"] > before + drain / 1000


# ---- rights


@each_manifest
def test_containers_have_no_rights(name):
    for container in containers(name):
        security = container.security()
        folders = container.name == "folders"  # makes folders of the host for kvernd, and ends
        assert security["runAsNonRoot"] or folders
        assert security["runAsUser"] > 0 or folders
        assert security["readOnlyRootFilesystem"] and security["allowPrivilegeEscalation"] is False
        assert security["capabilities"]["drop"] == ["ALL"]
        assert security["capabilities"].get("add", []) == (["CHOWN", "FOWNER"] if folders else [])
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not security.get("privileged")
        assert not {"hostIPC", "hostPID", "hostNetwork"} & set(container.pod)
        assert container.pod["enableServiceLinks"] is False
        assert "limits" in container.spec["resources"]
        image = container.spec["image"]
        assert image.startswith("registry.example.com/kvern/") and ":" in image and not image.endswith(":latest")


@each_manifest
def test_daemons_run_as_the_image_says(name):
    (daemon,) = daemons(name)
    security = daemon.security()
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == user()


@pytest.mark.parametrize("name", ["sidecar", "single-node"])
def test_the_sidecar_needs_nothing_of_the_host(name):
    for container in containers(name):
        assert not [volume for volume in container.pod["volumes"] if "hostPath" in volume]
    (daemon,) = daemons(name)
    assert daemon.spec["restartPolicy"] == "Always"  # a sidecar, and no step before the engine
    assert "readinessProbe" not in daemon.spec  # an engine without its cache still serves


@each_manifest
def test_no_secret_is_in_a_manifest(name):
    assert of_kind(name, "Secret") == []


def test_no_trace_of_lmcache_is_left_after_the_switch():
    (chat,) = engines("from-lmcache")
    assert "lmcache" not in yaml.safe_dump(chat.workload).lower()


# ---- the guide

GUIDE = (ROOT / "docs/kubernetes.md").read_text()


def test_rows_of_the_sizing_table_go_together():
    rows = re.findall(r"^\| (\d+GiB) \| (\d+Gi) \| (\d+Gi) \| \d+ \|$", GUIDE, re.MULTILINE)
    assert len(rows) >= 5
    for dram, volume, memory in rows:
        assert size(volume) == volume_bytes(size(dram))
        assert size(memory) == memory_bytes({"store": {"dram_bytes": dram}})


def test_tokens_of_the_sizing_table_are_what_its_bytes_say():
    rows = re.findall(r"^\| [\w.-]+ \| (\d+) KiB \| ([\d,]+) \| ([\d,]+) \|$", GUIDE, re.MULTILINE)
    assert len(rows) >= 4
    for kib, raw, int8 in rows:
        tokens = (16 << 30) // (int(kib) << 10)
        assert int(raw.replace(",", "")) == tokens
        assert int(int8.replace(",", "")) == pytest.approx(tokens / 0.52, rel=0.01)


def test_paths_of_the_guide_are_there():
    paths = set(re.findall(r"\b(deploy/[\w./-]*\w)", GUIDE))
    paths |= {f"deploy/kubernetes/{path}" for path in re.findall(r"`((?:overlays|components)/[\w-]+)`", GUIDE)}
    assert len(paths) >= 8
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_examples_of_the_guide_are_those_that_there_are():
    table = re.findall(r"^\| `([a-z-]+)` \|", GUIDE, re.MULTILINE)
    assert sorted(table) == sorted(path.parent.name for path in FOLDER.glob("examples/*/kustomization.yaml"))


def test_kvernd_takes_the_configuration_of_the_guide(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "kvernd.toml").write_text(text)
    assert check_config(tmp_path / "kvernd.toml").returncode == 0


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
def test_kustomize_takes_the_kustomization_of_the_guide(tmp_path):
    (text,) = re.findall(r"```yaml\n(# kustomization.yaml\n.*?)```", GUIDE, re.DOTALL)
    here = os.path.relpath(FOLDER, tmp_path.resolve())
    assert "kvern/deploy/kubernetes/" in text
    (tmp_path / "kustomization.yaml").write_text(text.replace("kvern/deploy/kubernetes/", f"{here}/"))
    made = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    made_objects = [each for each in yaml.safe_load_all(made.stdout) if each]
    for each in made_objects:
        validate(each, VERSIONS[-1])
        assert each["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert {"PodMonitor", "PrometheusRule"} <= {each["kind"] for each in made_objects}
    out = {
        port["port"]
        for each in made_objects
        if each["kind"] == "NetworkPolicy"
        for rule in each["spec"].get("egress", [])
        for port in rule["ports"]
    }
    assert out == {53, 443, 4318, 6379, 9000}


# ---- the DaemonSet's shape with real processes


@pytest.fixture
def node(root, tmp_path):
    """The folders of a node that are shared between pods, and kvernd in a pod of its own."""
    uid, gid = map(int, user().split(":"))
    socket_folder = tmp_path / "run"
    memory_folder = pathlib.Path(f"/dev/shm/kvern-test-{os.getpid()}")
    for folder, mode in ((socket_folder, 0o750), (memory_folder, 0o700)):
        folder.mkdir()
        folder.chmod(mode)
        os.chown(folder, uid, gid)
    started = []

    def pod() -> DaemonContainer:
        folder = tmp_path / f"pod{len(started)}"
        folder.mkdir()
        volumes = {"/run/kvern": str(socket_folder), "/dev/shm/kvern": str(memory_folder)}
        started.append(DaemonContainer(root, folder, user(), volumes))
        return started[-1].run_daemon({"KVERN_STORE_DRAM_BYTES": "64MiB"})

    pod.socket_folder = socket_folder
    yield pod
    for each in started:
        each.kill()
    shutil.rmtree(memory_folder)


def doctor(root, folder: pathlib.Path, as_user: str, socket_folder: pathlib.Path) -> subprocess.CompletedProcess:
    """kvernctl doctor in another pod, which has nothing but the socket's folder of the node."""
    client = Container(root, folder, as_user, {"/run/kvern": str(socket_folder), "/dev/shm": "16m"})
    client.start(["kvernctl", "doctor"], image_environment())
    client.child.wait(60)
    return subprocess.CompletedProcess([], client.child.returncode, client.log.read_text())


def test_an_engines_pod_needs_the_socket_alone(node, root, tmp_path):
    node()
    done = doctor(root, tmp_path, "10002:10001", node.socket_folder)
    assert done.returncode == 0, done.stdout
    assert "the data plane is shm" in done.stdout and "bit for bit" in done.stdout


def test_who_is_not_in_the_group_cannot_open_the_socket(node, root, tmp_path):
    node()
    done = doctor(root, tmp_path, "10003:10003", node.socket_folder)
    assert done.returncode == 1 and "fault" in done.stdout, done.stdout


def test_the_next_pod_takes_the_memory_of_the_last_back(node, root, tmp_path):
    first = node()
    assert doctor(root, tmp_path, "10002:10001", node.socket_folder).returncode == 0
    stored = first.metric("kvern_tier_chunks")
    assert stored > 0
    first.stop()
    second = node()
    assert second.metric("kvern_recovered_chunks") == stored
