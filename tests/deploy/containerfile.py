"""Reads deploy/container/Containerfile: its stages, what they install and what they copy."""

import dataclasses
import re
import shlex

from engine import ROOT

PATH = ROOT / "deploy/container/Containerfile"


@dataclasses.dataclass
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.instructions if name == instruction]

    def packages(self) -> list[str]:
        """What apt-get installs."""
        found = []
        for run in self.all("RUN"):
            for command in re.findall(r"apt-get install (.*?)(?:&&|$)", run):
                found += [word for word in command.split() if not word.startswith("-")]
        return found

    def copies(self) -> list[tuple[str, list[str], str]]:
        """(stage or "" for the sources, what, where to) of each COPY."""
        found = []
        for rest in self.all("COPY"):
            words = shlex.split(rest)
            options = [word for word in words if word.startswith("--")]
            *sources, target = [word for word in words if not word.startswith("--")]
            stages = [option.removeprefix("--from=") for option in options if option.startswith("--from=")]
            found.append((stages[0] if stages else "", sources, target))
        return found


def instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    stage = Stage("", "")  # what stands before the first FROM
    for name, rest in instructions(PATH.read_text()):
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stage = Stage(alias, base)
            found[alias] = stage
        else:
            stage.instructions.append((name, rest))
    return found


def chain(name: str) -> list[Stage]:
    """A stage of the file and those that it stands on."""
    every = stages()
    found = []
    while name in every:
        found.append(every[name])
        name = every[name].base
    return found
