"""The container file: its steps, and the daemon from exactly the files that its last stage holds."""

import pathlib
import re
import subprocess
import sys

import pytest
import requests

import containerfile
from engine import BUILD, ROOT, free_port, tail
from image import DaemonContainer, build_output, entry, image_environment, runtime_packages, user

BUILD_TOOLS = {"cc", "c++", "gcc", "g++", "ld", "make", "cmake", "ninja", "python3", "pip", "protoc", "sh", "bash"}


def test_hadolint_finds_nothing():
    hadolint = pathlib.Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, containerfile.PATH], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bases_are_named_once_and_never_latest():
    every = containerfile.stages()
    arguments = [rest for name, rest in containerfile.instructions(containerfile.PATH.read_text()) if name == "ARG"]
    base = dict(argument.split("=", 1) for argument in arguments if "=" in argument)["BASE"]
    assert re.fullmatch(r"debian:12-slim(@sha256:[0-9a-f]{64})?", base)
    for stage in every.values():
        assert stage.base in ("${BASE}", "toolchain-${VARIANT}", *every), stage.base
    assert ":latest" not in containerfile.PATH.read_text()


def test_both_variants_have_a_toolchain():
    names = set(containerfile.stages())
    assert {"toolchain-cpu", "toolchain-cuda"} <= names
    assert list(containerfile.stages())[-1] == "daemon"  # what is built when no target is named


def test_images_do_not_run_as_root():
    for name in ("daemon", "engine"):
        uid, gid = containerfile.stages()[name].all("USER")[-1].split(":")
        assert int(uid) > 0 and int(gid) > 0  # numbers: Kubernetes cannot tell what a name stands for


def test_no_secret_is_baked_in():
    secret = re.compile(r"password|passwd|secret|token|credential|api_?key", re.IGNORECASE)
    for name, rest in containerfile.instructions(containerfile.PATH.read_text()):
        assert not secret.search(rest), f"{name} {rest}"


def test_every_copied_source_is_there_and_passes_the_ignore_file():
    ignore = pathlib.Path(f"{containerfile.PATH}.dockerignore").read_text().split("\n")
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    used = set()
    for stage in containerfile.stages().values():
        for origin, sources, _ in stage.copies():
            if origin:
                assert origin in containerfile.stages(), origin
                continue
            for source in sources:
                assert (ROOT / source).exists(), source
                used.add(source)
    assert used == let_in


def test_every_module_of_the_build_is_copied():
    modules = re.search(r"foreach\(module ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
    copied = {source for _, sources, _ in containerfile.stages()["build"].copies() for source in sources}
    assert {*modules, "cmake", "python_shim"} <= copied


def test_what_compiles_is_what_the_project_is_built_with():
    known = {line.strip() for line in (ROOT / "tools/packages-debian.txt").read_text().splitlines()}
    assert set(containerfile.stages()["toolchain-cpu"].packages()) <= known


@pytest.fixture(scope="module")
def container(root, tmp_path_factory):
    memory = {"/run/kvern": "1m", "/var/lib/kvern": "64m", "/dev/shm": "192m"}
    container = DaemonContainer(root, tmp_path_factory.mktemp("container"), user(), memory)
    yield container.run_daemon({"KVERN_STORE_DRAM_BYTES": "128MiB"})
    container.kill()


def test_no_build_tool_is_in_the_image(root):
    assert not root.programs() & BUILD_TOOLS
    assert not list(root.path.glob("usr/include/**/*.h"))


def test_the_daemon_starts_from_the_files_of_the_image(container):
    assert requests.get(f"{container.url}/healthz", timeout=10).text == "ok\n"
    assert "kvern_build_info" in requests.get(f"{container.url}/metrics", timeout=10).text


def test_it_runs_as_the_image_says_and_can_write_its_volumes_alone(container):
    status = pathlib.Path(f"/proc/{container.inside}/status").read_text()
    uid, gid = user().split(":")
    assert re.search(rf"^Uid:\t{uid}\t{uid}\t{uid}\t{uid}$", status, re.MULTILINE)
    assert re.search(rf"^Gid:\t{gid}\t{gid}\t{gid}\t{gid}$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    mounts = pathlib.Path(f"/proc/{container.inside}/mounts").read_text().splitlines()
    writable = {line.split()[1] for line in mounts if "rw" in line.split()[3].split(",")}
    assert writable == {"/dev/null", "/dev/shm", "/run/kvern", "/var/lib/kvern"}


def test_the_health_check_of_the_image_succeeds(container):
    done = container.run(entry("HEALTHCHECK"), image_environment())
    assert done.returncode == 0, done.stdout + done.stderr


def test_doctor_stores_and_loads_in_the_image(container):
    done = container.run(["kvernctl", "doctor"], image_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a probe chunk was stored, found and loaded, bit for bit" in done.stdout
    assert "fault" not in done.stdout


def test_ucx_loads_from_the_files_of_the_image(root, tmp_path):
    """The module with UCX is opened only when it is asked for: a daemon for other hosts needs it."""
    container = DaemonContainer(root, tmp_path, user(), {"/run/kvern": "1m", "/dev/shm": "192m"})
    settings = {
        "KVERN_STORE_DRAM_BYTES": "64MiB",
        "KVERN_SERVER_TCP_LISTEN": f"127.0.0.1:{free_port()}",
        "KVERN_SERVER_INSECURE": "true",
        "KVERN_SERVER_UCX_LISTEN": "127.0.0.1",
    }
    try:
        container.run_daemon(settings)
        done = container.run(["kvernctl", "doctor"], image_environment())
        assert re.search(r"UCX \d", done.stdout), done.stdout + tail(container.log)
    finally:
        container.kill()


def test_the_python_package_needs_no_library_that_the_image_lacks(root):
    (module,) = (BUILD / "python/kvern").glob("_kvern*.so")
    linked = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"=> (/\S+)", linked):
        assert (root.path / library.lstrip("/")).exists(), library


def test_every_library_of_the_image_is_used():
    sources = [source for origin, sources, _ in containerfile.stages()["daemon"].copies() if origin for source in sources]
    needed = "".join(
        subprocess.run(["readelf", "-d", build_output(source)], capture_output=True, text=True, check=True).stdout
        for source in sources
    )
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", needed))
    for package in set(runtime_packages()) - {"ca-certificates"}:
        files = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True).stdout
        assert needed & {pathlib.Path(file).name for file in files.splitlines()}, f"nothing needs {package}"


def test_a_stop_signal_drains_and_ends_in_good_order(container):
    """Last: it ends the daemon."""
    container.stop()
    assert "stopped" in tail(container.log), tail(container.log)
    assert container.child.returncode == 0
