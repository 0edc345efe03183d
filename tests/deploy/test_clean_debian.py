"""From a bare Debian 12, a root that debootstrap has just made: what the README asks for first, and `make setup`, with which
all targets of the Makefile begin, give all that the build needs, and `make demo` builds it and shows what the README says.

Nothing of this machine is in that root but what reaches the network (names, certificates, settings of package indexes), and
the caches of Python packages and of compiled files, which only save time: without the latter it takes the better part of
an hour."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

from engine import ROOT

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is not here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap and chroot need root"),
]

README = ROOT / "README.md"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
NETWORK_VARIABLES = re.compile(r"PIP_|UV_|(?:https?|no|all)_proxy$", re.IGNORECASE)
CACHES = ("/root/.cache/uv", "/root/.ccache")
MINUTE = 60


def mirror() -> str:
    """Where this machine has its Debian from."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = [line.split()[0] for line in targets if line.split()[1:] == ["bookworm", "main"]]
    if not found:
        pytest.skip("apt knows no source of Debian 12 here")
    return found[0]


class CleanDebian:
    def __init__(self, folder: pathlib.Path):
        self.root = folder / "root"
        self._run(["debootstrap", "--variant=minbase", "bookworm", str(self.root), mirror()], 10 * MINUTE)
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        shutil.copy(CERTIFICATES, self.root / "etc/machine.crt")
        # What a clone has.
        ignored = shutil.ignore_patterns(".git", "build", ".venv", "dist", "__pycache__", "*.egg-info", ".pytest_cache")
        shutil.copytree(ROOT, self.root / "kvern", ignore=ignored)

    def run(self, script: str, minutes: float) -> str:
        """Shell commands in the folder of the sources, in mounts and processes of their own that end with them."""
        mounts = [
            f"mount -t proc proc {self.root}/proc",
            f"mount --rbind /sys {self.root}/sys",
            f"mount --rbind /dev {self.root}/dev",
            f"mount -t tmpfs tmpfs {self.root}/dev/shm",
        ]
        for cache in filter(os.path.isdir, CACHES):
            mounts += [f"mkdir -p {self.root}{cache}", f"mount --bind {cache} {self.root}{cache}"]
        enter = f'exec chroot {self.root} bash -euo pipefail -c "cd /kvern; $1"'
        environment = {name: value for name, value in os.environ.items() if NETWORK_VARIABLES.match(name)}
        environment |= {name: "/etc/machine.crt" for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")}
        environment |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        outer = "\n".join(["set -eu", "mount --make-rprivate /", *mounts, enter])
        return self._run([*unshare, "sh", "-c", outer, "sh", script], minutes * MINUTE, environment)

    @staticmethod
    def _run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    made = CleanDebian(tmp_path_factory.mktemp("debian"))
    (first,) = re.findall(r"`(apt-get install [^`]*)`", README.read_text())
    made.run(first.replace("install", "install -y --no-install-recommends"), 10)
    yield made
    shutil.rmtree(made.root)


def test_setup_ends_well_and_the_next_one_has_nothing_to_do(debian):
    assert "setup: done" in debian.run("make setup", 40)
    assert "Python packages are up to date" in debian.run("make setup", 5)


def test_the_build_finds_all_that_it_needs(debian):
    configured = debian.run("cmake --preset release -DKVERN_PYTHON=ON -DPython_EXECUTABLE=/kvern/.venv/bin/python", 10)
    assert "Build files have been written to" in configured


def test_the_demo_restores_a_prompt_in_a_new_engine(debian):
    debian.run("apt-get install -y --no-install-recommends ccache", 10)
    shown = debian.run("make demo", 120)
    row = re.search(r"^ *lossless, new engine +[\d.]+ s +\d+ x +(\d+) of 3000 .* yes$", shown, re.MULTILINE)
    assert row is not None and int(row[1]) > 2900, shown[-3000:]
