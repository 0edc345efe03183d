"""The programs that the package brings along: kvernd and kvernctl, and the commands of kvern."""

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


def kvern() -> None:
    if sys.argv[1:2] != ["calibrate"]:
        sys.exit("usage: kvern calibrate MODEL --text FILE    (see kvern calibrate --help)")
    from kvern import calibrate

    calibrate.main(sys.argv[2:])
