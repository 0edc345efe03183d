"""What the documentation says is what the programs do: the reference of keys, links, and commands."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from daemon import binary
from engine import BUILD, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND_SECONDS = 120


def test_the_reference_of_keys_is_what_the_programs_say():
    command = [sys.executable, str(ROOT / "tools/config_reference.py"), binary("kvernd"), "--print"]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    written = (ROOT / "docs/configuration.md").read_text()
    assert written == made, "run tools/config_reference.py build/release/bin/kvernd"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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


@pytest.fixture
def place(tmp_path):
    """A home of its own, with the programs on the path; daemons that commands leave behind are ended."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        "PATH": f"{BUILD / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(runtime),
        "LANG": "C.UTF-8",
        "KVERN_DOCS": str(ROOT / "docs"),
        "KVERN_DEPLOY": str(ROOT / "deploy"),
    }
    yield work, environment
    for pid in (tmp_path / "work").glob("*.pid"):
        subprocess.run(["kill", pid.read_text().strip()], check=False)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if RUNNABLE.search(page.read_text())], ids=lambda page: page.name
)
def test_commands_of_a_page_do_what_it_says(page, place):
    """All blocks of a page, one after the other in one shell. A line "# prints: text" means that what was printed since
    the line before it contains the text."""
    work, environment = place
    script = ["exec 2>&1"]
    wanted = []
    for block in RUNNABLE.findall(page.read_text()):
        for line in block.splitlines():
            if line.startswith("# prints: "):
                wanted.append(line.removeprefix("# prints: "))
                script.append(f'echo "--- {len(wanted)} ---"')
            else:
                script.append(line)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(script)],
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
