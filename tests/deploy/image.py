"""The image as its file describes it: what its last stage holds, and how it is started."""

import json
import os
import pathlib
import shlex
import signal
import time

import requests

import containerfile
from clean_root import CleanRoot, Container
from engine import BUILD, ROOT, free_port, tail

READY_SECONDS = 30


def entry(instruction: str) -> list[str]:
    """The exec form of an instruction of the last stage."""
    (rest,) = containerfile.stages()["daemon"].all(instruction)
    return json.loads(rest[rest.index("[") :])


def image_environment() -> dict[str, str]:
    words = [word for rest in containerfile.stages()["daemon"].all("ENV") for word in shlex.split(rest)]
    found = dict(word.split("=", 1) for word in words)
    found["PATH"] = found["PATH"].replace("$PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return found


def user() -> str:
    return containerfile.stages()["daemon"].all("USER")[-1]


def runtime_packages() -> list[str]:
    return [package for stage in containerfile.chain("daemon") for package in stage.packages()]


def build_output(path: str) -> pathlib.Path:
    """A file that the build stage leaves in /build, from the build that is here."""
    assert path.startswith("/build/")
    return BUILD / path.removeprefix("/build/")


def unpack(folder: pathlib.Path) -> CleanRoot:
    """Packages, and the files of the COPY lines."""
    root = CleanRoot(folder, runtime_packages())
    for origin, sources, target in containerfile.stages()["daemon"].copies():
        for source in sources:
            root.add(build_output(source).resolve() if origin else ROOT / source, target)
    return root


class DaemonContainer(Container):
    """The daemon by the image's entry point, as the image's user, on a read-only root."""

    def run_daemon(self, settings: dict[str, str]) -> "DaemonContainer":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        listen = {"KVERN_METRICS_LISTEN": f"127.0.0.1:{port}"}
        self.start(entry("ENTRYPOINT"), {**image_environment(), **listen, **settings})
        deadline = time.monotonic() + READY_SECONDS
        while True:
            assert self.alive, tail(self.log)
            try:
                if requests.get(f"{self.url}/readyz", timeout=10).ok:
                    return self
            except requests.ConnectionError:
                pass
            assert time.monotonic() < deadline, tail(self.log)
            time.sleep(0.02)

    def metric(self, name: str) -> float:
        lines = requests.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + " ", name + "{")))

    def stop(self) -> None:
        """As a container runtime stops it."""
        os.kill(self.inside, getattr(signal, containerfile.stages()["daemon"].all("STOPSIGNAL")[0]))
        self.child.wait(READY_SECONDS)
