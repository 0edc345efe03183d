"""A root directory that holds the files of some Debian packages, of all that these depend on, and nothing else: no shell,
no compiler, no Python. Programs run in it as in a container with a read-only root file system."""

import os
import pathlib
import re
import shutil
import subprocess

from engine import Process, tail

# Links of a merged /usr: in packages of Debian 12 many files still lie in /lib.
MERGED = ("bin", "lib", "lib64", "sbin")


def query(package: str, field: str) -> str:
    done = subprocess.run(["dpkg-query", "-W", "-f", f"${{{field}}}\n", package], capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.returncode == 0 else ""


def closure(packages: list[str]) -> set[str]:
    """These packages and, where they are installed here, all that they depend on."""
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        package = waiting.pop()
        if package in found:
            continue
        found.add(package)
        depends = ",".join(query(package, field) for field in ("Depends", "Pre-Depends"))
        for alternatives in filter(str.strip, depends.split(",")):
            names = [re.split(r"[ (:]", name.strip())[0] for name in alternatives.split("|")]
            waiting += [name for name in names if query(name, "db:Status-Status") == "installed"][:1]
    return found


class CleanRoot:
    def __init__(self, folder: pathlib.Path, packages: list[str]):
        self.path = folder
        for name in MERGED:
            (folder / "usr" / name).mkdir(parents=True)
            (folder / name).symlink_to(f"usr/{name}")
        for name in ("proc", "sys", "dev/shm", "tmp", "etc"):
            (folder / name).mkdir(parents=True)
        (folder / "dev/null").touch()
        for package in sorted(closure(packages)):
            listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True)
            assert listed.returncode == 0, f"{package} is not installed: run make setup"
            for name in listed.stdout.splitlines():
                self.add(pathlib.Path(name), name)

    def add(self, source: pathlib.Path, target: str) -> None:
        """A file, or a link as a link. Folders come with what is in them."""
        there = self.path / target.lstrip("/")
        if source.is_symlink() and not source.is_dir():
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)
            there.symlink_to(os.readlink(source))
        elif source.is_file():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, there)

    def programs(self) -> set[str]:
        """Names of all that could be run."""
        return {path.name for folder in ("usr/bin", "usr/sbin") for path in (self.path / folder).iterdir()}


class Container(Process):
    """One program in a clean root, as a user without any right, in namespaces of its own for mounts, IPC and processes. The
    root is read-only but for `volumes`: tmpfs of a size ("64m"), or a folder of the host by its path."""

    def __init__(self, root: CleanRoot, folder: pathlib.Path, user: str, volumes: dict[str, str]):
        super().__init__("container", folder)
        self.root = root
        self.user = user
        uid, gid = user.split(":")
        for name in volumes:
            (root.path / name.lstrip("/")).mkdir(parents=True, exist_ok=True)
        mounts = [
            f"mount --bind {what} {root.path}{name}"
            if what.startswith("/")
            else f"mount -t tmpfs -o size={what},uid={uid},gid={gid},mode=0750 tmpfs {root.path}{name}"
            for name, what in volumes.items()
        ]
        self._script = "\n".join(
            [
                "set -eu",
                f"mount --bind {root.path} {root.path}",
                f"mount -t proc -o ro proc {root.path}/proc",
                f"mount --bind -o ro /sys {root.path}/sys",
                f"mount --bind /dev/null {root.path}/dev/null",
                *mounts,
                f"mount -o remount,ro,bind {root.path}",
                f'exec chroot --userspec={user} --groups="" {root.path} "$@"',
            ]
        )

    def start(self, command: list[str], environment: dict[str, str]) -> "Container":
        # --kill-child: what runs inside ends with unshare.
        unshare = ["unshare", "--mount", "--ipc", "--pid", "--fork", "--kill-child"]
        self.spawn([*unshare, "sh", "-c", self._script, "sh", *command], stdin=subprocess.DEVNULL, env=environment)
        return self

    @property
    def inside(self) -> int:
        """The process id, seen from here, of the program."""
        children = pathlib.Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        assert len(children) == 1, tail(self.log)
        return int(children[0])

    def run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
        """Another program beside the first, as `docker exec` does it."""
        uid, gid = self.user.split(":")
        enter = ["nsenter", "--target", str(self.inside), "--mount", "--ipc", "--pid", "--root", "--wd=/"]
        return subprocess.run(
            [*enter, "--setuid", uid, "--setgid", gid, "--", *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
