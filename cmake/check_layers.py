#!/usr/bin/env python3
"""Refuses an #include that goes against the arrows of the house.

Usage: check_layers.py SOURCE_ROOT

The arrows are read from cmake/KvernModule.cmake (KVERN_ARROWS_*), so that there is one list of them. Tests, benchmarks
and fuzzers may use everything. Exit code 1 and one line per offence otherwise.
"""

import pathlib
import re
import sys

SUFFIXES = {".h", ".cc", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([a-z_]+)/')


def arrows(root: pathlib.Path) -> dict[str, set[str]]:
    text = (root / "cmake" / "KvernModule.cmake").read_text()
    found = re.findall(r'set\(KVERN_ARROWS_(\w+) ([^)]*)\)', text)
    return {module: set(used.replace('"', "").split()) for module, used in found}


def main() -> int:
    root = pathlib.Path(sys.argv[1])
    allowed = arrows(root)
    offences = []
    for module, uses in allowed.items():
        for path in sorted((root / module).rglob("*")):
            if path.suffix not in SUFFIXES:
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                match = INCLUDE.match(line)
                if match and match[1] in allowed and match[1] != module and match[1] not in uses:
                    where = path.relative_to(root)
                    offences.append(f"{where}:{number}: {module} must not include {match[1]} (allowed: {sorted(uses)})")
    print("\n".join(offences), file=sys.stderr, end="\n" if offences else "")
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main())
