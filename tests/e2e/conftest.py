import pathlib
import sys

import pytest

from daemon import Daemon
from engine import ROOT, Engine, Server, kvern_transfer

sys.path.append(str(ROOT / "tests" / "deploy"))  # the Prometheus of those tests


def pytest_addoption(parser):
    parser.addoption("--run-full", action="store_true", help="run the long matrix too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--run-full"):
        return
    skip = pytest.mark.skip(reason="long matrix: make test-full")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What the engines and the daemon said of Kvern, beside a failure."""
    report = yield
    stage = getattr(item, "funcargs", {}).get("stage")
    if report.failed and stage is not None:
        for process in filter(None, [stage.daemon, *stage.engines]):
            lines = [line for line in process.log.read_text(errors="replace").splitlines() if "kvern" in line.lower()]
            report.sections.append((process.log.name, "\n".join(line[:300] for line in lines[-25:])))
    return report


class Stage:
    """The daemon and the engines of one test module, and the checks that nothing of them is left behind."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.daemon: Daemon | None = None
        self.engines: list[Engine | Server] = []

    def start_daemon(self, settings: dict | None = None, **options) -> Daemon:
        self.daemon = Daemon(self.folder, settings, **options).start()
        return self.daemon

    def engine(self, model: pathlib.Path, kvern: dict | None = None, **options) -> Engine:
        """Starts an engine on the daemon; wait_started() is the caller's."""
        if "transfer" not in options:
            options["transfer"] = kvern_transfer(self.daemon.address, **(kvern or {}))
        engine = Engine(model, self.folder, **options)
        self.engines.append(engine)
        return engine

    def server(self, model: pathlib.Path, kvern: dict | None = None, **options) -> Server:
        server = Server(model, self.folder, transfer=kvern_transfer(self.daemon.address, **(kvern or {})), **options)
        self.engines.append(server)
        return server

    def check_quiet(self) -> None:
        """With no request under way nobody holds staging, leases or reservations."""
        if self.daemon is not None and self.daemon.alive:
            self.daemon.wait_quiet()

    def close(self) -> None:
        for engine in self.engines:
            engine.stop()
        if self.daemon is None:
            return
        try:
            if self.daemon.alive:
                self.daemon.wait_sessions(0)
                self.daemon.stop()
                assert not self.daemon.socket.exists(), "kvernd left its socket behind"
                assert not self.daemon.run_folder.exists(), "kvernd left shared-memory files behind"
        finally:
            self.daemon.destroy()


@pytest.fixture(scope="module")
def stage(tmp_path_factory, request):
    stage = Stage(tmp_path_factory.mktemp(request.module.__name__))
    yield stage
    stage.close()


@pytest.fixture(autouse=True)
def nothing_leaked(request):
    yield
    if "stage" in request.fixturenames:
        request.getfixturevalue("stage").check_quiet()
