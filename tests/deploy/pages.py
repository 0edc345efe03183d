"""Reads the documentation: which commands a page gives, and which of them a test runs.

A page marks a block that is run with `<!-- run -->` before its ```sh fence. What the run needs and a reader does not is in a
comment `<!-- prepare` … `-->` before it."""

import dataclasses
import pathlib
import re

from engine import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_RUN = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```$|^<!-- prepare\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
_MARKED = re.compile(r"^<!-- run -->\n```sh\n.*?^```$|^<!-- prepare\n.*?^-->$", re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")

# What begins a command in an indented block, which may as well hold output, a file, or a picture of a tree.
_PROGRAMS = (
    "kvernctl kvern vllm make cmake ctest ninja pip uv python python3 pytest curl docker podman kubectl helm promtool "
    "systemctl apt apt-get git redis-cli nvidia-smi sh bash"
).split()
_COMMAND = re.compile(rf"^(?:\$ )?(?:sudo )?(?:\w+=\S+ )*(?:(?:{'|'.join(_PROGRAMS)}) [\w./<-]|kvernd --|(?:tools|bench|build|deploy)/\S*\w)")
_OWN = re.compile(r"^(?:kvernd --|(?:kvernctl|kvern) [a-z-])")
_REMARK = re.compile(r"(?:^|\s)#(?:\s.*)?$")


@dataclasses.dataclass(frozen=True)
class Command:
    page: str
    text: str  # one line, continued lines joined

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def script(page: pathlib.Path) -> list[str]:
    """The lines of all blocks that are run, in their order."""
    lines: list[str] = []
    for block, preparation in _RUN.findall(page.read_text()):
        lines += (block or preparation).splitlines()
    return lines


def _joined(block: str) -> list[str]:
    """Lines, with those that go on behind a backslash or within quotes made one."""
    lines: list[str] = []
    whole = True
    for line in block.splitlines():
        line = _REMARK.sub("", line).strip()
        if whole:
            lines.append(line)
        else:
            lines[-1] = f"{lines[-1].removesuffix(chr(92)).rstrip()} {line}"
        whole = not lines[-1].endswith("\\") and lines[-1].count("'") % 2 == 0
    return [line for line in lines if line]


def _indented(text: str) -> list[str]:
    """Indented blocks, each a text."""
    return [
        "\n".join(line[4:] for line in block.splitlines())
        for block in re.findall(r"(?:(?<=\n\n)|\A)((?:    .*\n)+)", text)
    ]


def not_run(page: pathlib.Path) -> list[Command]:
    """Commands in blocks that no test runs. In an indented block only lines that begin with a program count."""
    text = _MARKED.sub("", page.read_text())
    lines = [line for block in _SHELL.findall(text) for line in _joined(block)]
    indented = [line for block in _indented(_FENCED.sub("", text)) for line in _joined(block)]
    lines += [line for line in indented if _COMMAND.match(line)]
    return [Command(page.name, line) for line in lines]


def own(page: pathlib.Path) -> list[Command]:
    """All commands of the project's programs, those within sentences too."""
    text = page.read_text()
    blocks = [line for block in [*_SHELL.findall(text), *_indented(_FENCED.sub("", text))] for line in _joined(block)]
    spans = _SPAN.findall(_FENCED.sub("", text))
    return [Command(page.name, line) for line in [*blocks, *spans] if _OWN.match(line)]
