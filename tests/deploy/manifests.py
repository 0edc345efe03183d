"""Reads deploy/kubernetes/rendered: the objects of each overlay and example, and what their pods mount."""

import dataclasses
import json
import pathlib
import tomllib

import yaml

from engine import ROOT

FOLDER = ROOT / "deploy/kubernetes"
NAMES = sorted(path.stem for path in (FOLDER / "rendered").glob("*.yaml"))
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def size(text: str) -> int:
    digits = text.rstrip("KMGiB")
    return int(digits) * UNITS.get(text.removeprefix(digits), 1)


def source(name: str) -> pathlib.Path:
    """The folder that a rendered file comes from."""
    (folder,) = [folder for folder in FOLDER.glob(f"*/{name}") if (folder / "kustomization.yaml").exists()]
    return folder


def objects(name: str) -> list[dict]:
    return [each for each in yaml.safe_load_all((FOLDER / f"rendered/{name}.yaml").read_text()) if each]


def of_kind(name: str, *kinds: str) -> list[dict]:
    return [each for each in objects(name) if each["kind"] in kinds]


@dataclasses.dataclass
class Container:
    workload: dict
    spec: dict

    @property
    def name(self) -> str:
        return self.spec["name"]

    @property
    def pod(self) -> dict:
        return self.workload["spec"]["template"]["spec"]

    @property
    def pod_labels(self) -> dict[str, str]:
        return self.workload["spec"]["template"]["metadata"]["labels"]

    def security(self) -> dict:
        """Its own settings over those of the pod."""
        return {**self.pod.get("securityContext", {}), **self.spec.get("securityContext", {})}

    def port(self, wanted: int | str) -> int:
        if isinstance(wanted, int):
            return wanted
        (number,) = [port["containerPort"] for port in self.spec["ports"] if port["name"] == wanted]
        return number

    def mount(self, path: str) -> tuple[dict, dict] | None:
        """The mount that a path lies in, the innermost, and its volume."""
        inside = [mount for mount in self.spec.get("volumeMounts", []) if (path + "/").startswith(mount["mountPath"] + "/")]
        if not inside:
            return None
        mount = max(inside, key=lambda mount: len(mount["mountPath"]))
        (volume,) = [volume for volume in self.pod["volumes"] if volume["name"] == mount["name"]]
        return mount, volume


def containers(name: str) -> list[Container]:
    found = []
    for workload in of_kind(name, "Deployment", "DaemonSet"):
        pod = workload["spec"]["template"]["spec"]
        found += [Container(workload, spec) for spec in pod.get("initContainers", []) + pod["containers"]]
    return found


def daemons(name: str) -> list[Container]:
    return [container for container in containers(name) if container.name == "kvernd"]


def engines(name: str) -> list[Container]:
    return [container for container in containers(name) if container.name == "vllm"]


def transfer_config(engine: Container) -> dict:
    arguments = engine.spec["args"]
    return json.loads(arguments[arguments.index("--kv-transfer-config") + 1])


def daemon_config(name: str, daemon: Container) -> tuple[str, dict]:
    """The text of the file that the image's entry point reads, and what is in it."""
    _, volume = daemon.mount("/etc/kvern/kvernd.toml")
    (config,) = [each for each in of_kind(name, "ConfigMap") if each["metadata"]["name"] == volume["configMap"]["name"]]
    text = config["data"]["kvernd.toml"]
    return text, tomllib.loads(text)
