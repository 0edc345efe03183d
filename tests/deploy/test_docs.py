"""What the documentation says is what the programs do: the reference of keys, links, and commands."""

import fnmatch
import functools
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest

import pages
from daemon import binary
from engine import BUILD, ROOT, free_port
from pages import PAGES, Command

LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND_SECONDS = 120

# Commands that no page's test runs, and why. A new command is run, or stands here.
COMPILES = "compiles everything, as the build did that this test runs from"
FLEET = "needs an engine with a model for minutes: tests/e2e does it"
LONG = "takes from half an hour to hours"
GPU = "needs an NVIDIA GPU and compiles everything"
CONTAINERS = "needs a container engine: test_container.py checks the file and starts the daemon from its last stage"
CLUSTER = "needs a cluster: test_kubernetes.py checks what would be applied"
HANDLE = "needs a compact cache: tests/kvernctl and tests/e2e/test_compact.py make some"
NOT_RUN = {
    ("README.md", "make demo"): COMPILES,
    ("README.md", "make test"): "runs this test",
    ("README.md", "pip install ."): "tests/e2e/test_package.py does it in a fresh environment",
    ("README.md", "vllm serve *"): FLEET,
    ("README.md", "kvernd --config kvernd.toml"): "stays in the foreground: the user guide has it in the background",
    ("benchmarks.md", "make bench"): LONG,
    ("compact-caches.md", "kvernctl compact show HANDLE --wait 30"): HANDLE,
    ("compact-caches.md", "kvernctl compact rm HANDLE"): HANDLE,
    ("compact-caches.md", "cmake --build *"): COMPILES,
    ("dashboards.md", "deploy/grafana/pictures.py *"): "needs a Prometheus: test_monitoring.py has one, and asks what is drawn",
    ("gpu.md", "*"): GPU,
    ("kubernetes.md", "docker *"): CONTAINERS,
    ("kubernetes.md", "kubectl label *"): CLUSTER,
    ("kubernetes.md", "kubectl apply *"): CLUSTER,
    ("kubernetes.md", "kubectl exec *"): CLUSTER,
    ("kubernetes.md", "kubectl create secret *"): CLUSTER,
    ("proxy.md", "vllm serve *"): FLEET,
    ("proxy.md", "kvern proxy *"): "needs two engines: tests/e2e/test_proxy.py starts it over them",
    ("quality.md", "make quality"): LONG,
    ("quality.md", "make quality-engine"): LONG,
    ("tracing.md", "OTEL_SERVICE_NAME=vllm *"): "needs an engine with a model: tests/e2e/test_tracing.py has one",
    ("tracing.md", "docker run *"): "needs a container engine: test_tracing.py has a collector of its own",
    ("user-guide.md", "make build"): COMPILES,
    ("user-guide.md", "vllm serve *"): FLEET,
    ("vllm.md", "pip install ."): "tests/e2e/test_package.py does it in a fresh environment",
    ("vllm.md", "vllm serve *"): FLEET,
}

# Programs that are not among the project's packages. A page that needs one is not run where it is missing.
OPTIONAL = ("kubectl",)

# What is run in place of what is written.
WAIT = "--for 600"
SHORT_WAIT = "--for 2"
METRICS = "127.0.0.1:9464"

PREAMBLE = """exec 2>&1
start_kvernd() {
  printf '[store]\\ndram_bytes = "256MiB"\\n[metrics]\\nlisten = "%s"\\n' "$KVERN_DOCS_METRICS" >kvernd.toml
  kvernd --config kvernd.toml >kvernd.log 2>&1 &
  echo $! >kvernd.pid
  until kvernctl --timeout-ms 1000 status >status.txt; do kill -0 "$(cat kvernd.pid)" || { cat kvernd.log; exit 1; }; done
}
"""


def by_name(page: pathlib.Path) -> str:
    return page.name


def test_the_reference_of_keys_is_what_the_programs_say():
    command = [sys.executable, str(ROOT / "tools/config_reference.py"), binary("kvernd"), "--print"]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    written = (ROOT / "docs/configuration.md").read_text()
    assert written == made, "run tools/config_reference.py build/release/bin/kvernd"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_within_the_project_lead_somewhere(page):
    broken = []
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        if not file.exists():
            broken.append(target)
        elif anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            if anchor not in anchors:
                broken.append(target)
    assert not broken


# ---- commands that are run


@pytest.fixture
def place(tmp_path):
    """A home of its own in which the sources lie, with the programs on the path; daemons that commands leave behind are
    ended."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    work = tmp_path / "work"
    work.mkdir()
    for name in ("deploy", "docs", "tools"):
        (work / name).symlink_to(ROOT / name)
    environment = {
        "PATH": f"{BUILD / 'bin'}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(runtime),
        "LANG": "C.UTF-8",
        "KVERN_DOCS_METRICS": f"127.0.0.1:{free_port()}",
    }
    yield work, environment
    for path in work.glob("*.pid"):
        end(int(path.read_text()))
    for log in work.glob("*.log"):  # the DRAM tier outlives its daemon on purpose
        for folder in re.findall(r" folder=(\S+)", log.read_text(errors="replace")):
            shutil.rmtree(folder, ignore_errors=True)


def end(pid: int) -> None:
    """Stops a process that is no child of this one, and waits for its end."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    signal.pidfd_send_signal(handle, signal.SIGTERM)
    ended, _, _ = select.select([handle], [], [], COMMAND_SECONDS)
    os.close(handle)
    assert ended, f"process {pid} did not end"


@pytest.mark.parametrize("page", [page for page in PAGES if pages.script(page)], ids=by_name)
def test_commands_of_a_page_do_what_it_says(page, place):
    """All blocks of a page, one after the other in one shell. A line "# prints: text" means that what was printed since
    the line before it contains the text."""
    work, environment = place
    script = []
    wanted = []
    for line in pages.script(page):
        if line.startswith("# prints: "):
            wanted.append(line.removeprefix("# prints: "))
            script.append(f'echo "--- {len(wanted)} ---"')
        else:
            script.append(line.replace(WAIT, SHORT_WAIT).replace(METRICS, environment["KVERN_DOCS_METRICS"]))
    missing = [name for name in OPTIONAL if f"\n{name} " in "\n".join(["", *script]) and shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not here")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", PREAMBLE + "\n".join(script)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rest = done.stdout
    for number, text in enumerate(wanted, 1):
        printed, _, rest = rest.partition(f"--- {number} ---\n")
        assert text in printed, f"{page.name}: {text!r} is not in {printed!r}"


# ---- commands that are not


def reasons(command: Command) -> list[tuple[str, str]]:
    return [entry for entry in NOT_RUN if entry[0] == command.page and fnmatch.fnmatchcase(command.text, entry[1])]


def test_a_command_that_is_not_run_is_listed_with_the_reason():
    unlisted = [str(command) for page in PAGES for command in pages.not_run(page) if not reasons(command)]
    assert not unlisted, "mark their blocks with <!-- run -->, or say in NOT_RUN why they cannot be run"


def test_no_reason_is_given_for_a_command_that_is_gone():
    used = {entry for page in PAGES for command in pages.not_run(page) for entry in reasons(command)}
    assert set(NOT_RUN) == used


def test_commands_are_found_in_every_kind_of_block(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n    kvernctl status    # a daemon's state\n    kvernd 0.1.0, running\n    TIER  USED\n\n"
        "```sh\nA=1 anything --at all \\\n  'in\n  quotes'\n```\n\n"
        "<!-- prepare\nstart_kvernd\n-->\n<!-- run -->\n```sh\nkvernctl doctor\n```\n\n```toml\n[store]\n```\n"
    )
    assert [command.text for command in pages.not_run(page)] == [
        "A=1 anything --at all 'in quotes'",
        "kvernctl status",
    ]
    assert pages.script(page) == ["start_kvernd", "kvernctl doctor"]


@functools.cache
def usage(*words: str) -> str:
    """What a program says of itself or of one of its commands."""
    program, *rest = words
    if program == "kvern":
        start = [sys.executable, "-c", "from kvern.programs import kvern; kvern()"]
    else:
        start = [binary(program)]
    environment = {**os.environ, "PYTHONPATH": str(BUILD / "python")}
    done = subprocess.run([*start, *rest, "--help"], capture_output=True, text=True, env=environment, timeout=COMMAND_SECONDS)
    return done.stdout + done.stderr


def commands_of(help_text: str) -> set[str]:
    """Subcommands that a usage lists."""
    _, _, listed = help_text.partition("Subcommands:\n")
    return set(re.findall(r"^  ([a-z]+) ", listed or help_text, re.MULTILINE))


def test_programs_know_the_commands_and_options_that_pages_name():
    wrong = []
    for command in [command for page in PAGES for command in pages.own(page)]:
        words = command.text.split("|")[0].split() if "'" not in command.text else command.text.split("'")[0].split()
        path = [words[0]]
        while len(words) > len(path) and words[len(path)] in commands_of(usage(*path)):
            path.append(words[len(path)])
        # kvernctl's own options may stand before the command.
        known = "".join(usage(*path[:depth]) for depth in range(1, len(path) + 1))
        if words[0] != "kvernd" and len(path) == 1 and not words[1].startswith("-"):
            wrong.append(f"{command}: there is no command {words[1]}")
        wrong += [
            f"{command}: there is no option {word}"
            for word in words
            if word.startswith("--") and not re.search(rf"{re.escape(word.split('=')[0])}\b", known)
        ]
    assert not wrong, "\n".join(wrong)
