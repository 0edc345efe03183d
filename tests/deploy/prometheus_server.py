"""A real Prometheus that scrapes one kvernd, and an engine where there is one, every second, with the rules of
deploy/prometheus."""

import pathlib
import shutil
import subprocess
import time

import requests
import yaml

from engine import ROOT, Process, free_port, tail

RULES = ROOT / "deploy" / "prometheus"
READY_SECONDS = 30
SCRAPE_SECONDS = 1


class Prometheus(Process):
    def __init__(self, folder: pathlib.Path, kvernd_port: int, vllm_port: int | None = None):
        super().__init__("prometheus", folder)
        config = yaml.safe_load((RULES / "prometheus.yaml").read_text())
        config["global"] = {name: f"{SCRAPE_SECONDS}s" for name in ("scrape_interval", "evaluation_interval")}
        # The job of what is not there stays out, or its target would be down.
        ports = {"kvernd": kvernd_port, "vllm": vllm_port}
        config["scrape_configs"] = [job for job in config["scrape_configs"] if ports[job["job_name"]] is not None]
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
        for name in config["rule_files"]:
            shutil.copy(RULES / name, folder)
        path = folder / "prometheus.yaml"
        path.write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_port()}"
        self.spawn(
            [
                "prometheus",
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address={self.address}",
            ],
            stdin=subprocess.DEVNULL,
        )

    def wait_ready(self) -> "Prometheus":
        def ready() -> bool:
            assert self.alive, tail(self.log)
            try:
                return requests.get(f"http://{self.address}/-/ready", timeout=10).ok
            except requests.ConnectionError:
                return False

        self.wait(ready, "Prometheus is ready")
        return self

    def api(self, path: str, **parameters: str) -> dict:
        answer = requests.get(f"http://{self.address}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, expression: str) -> list[float]:
        """The values of all series at this moment."""
        return [float(series["value"][1]) for series in self.api("query", query=expression)["result"]]

    def wait(self, holds, what: str, seconds: float = READY_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"after {seconds:.0f} s it does not hold that {what}; {tail(self.log)}"
            time.sleep(0.05)

    def scrapes(self) -> float:
        return min(self.query("count_over_time(up[1h])"), default=0)

    def wait_scrapes(self, number: int) -> None:
        """Of every target."""
        wanted = self.scrapes() + number
        self.wait(lambda: self.scrapes() >= wanted, f"there are {wanted} scrapes")
