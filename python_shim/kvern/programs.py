"""The programs that the package brings along: kvernd and kvernctl, and the commands of kvern."""

import importlib
import os
import pathlib
import shutil
import sys

_FOLDER = pathlib.Path(__file__).resolve().parent / "bin"


def find(name: str) -> str | None:
    packaged = _FOLDER / name
    if os.access(packaged, os.X_OK):
        return str(packaged)
    found = shutil.which(name)
    # The console scripts below carry the same names; only a real program ends the search.
    return found if found and not _is_script(found) else None


def _is_script(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


def _run(name: str) -> None:
    program = find(name)
    if program is None:
        sys.exit(f"{name}: the program is not in this installation ({_FOLDER}). Install Kvern with `pip install .`.")
    os.execv(program, [program, *sys.argv[1:]])


def kvernd() -> None:
    _run("kvernd")


def kvernctl() -> None:
    _run("kvernctl")


_COMMANDS = {
    "calibrate": "learns how keys of adjacent layers are brought together",
    "proxy": "an OpenAI-compatible front that lets ordinary clients decode from compact caches",
}


def kvern() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in _COMMANDS:
        known = "\n".join(f"  {name:10} {purpose}" for name, purpose in _COMMANDS.items())
        sys.exit(f"usage: kvern COMMAND …    (kvern COMMAND --help)\n{known}")
    importlib.import_module(f"kvern.{command}").main(sys.argv[2:])
