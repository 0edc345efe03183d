"""Turns the JUnit files of `make test-full` into the table of docs/test-full.md.

python tools/test_summary.py build/reports/*.xml > docs/test-full.md
"""

import datetime
import platform
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree


@dataclass
class Row:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    skipped_names: list[str] = field(default_factory=list)


def suite_of(case: ElementTree.Element, report: str) -> str:
    """Where the case is counted: C++ all together, Python by file, cases of engines one by one."""
    if report == "ctest":
        return "C++: units, properties, golden vectors, integration"
    file = case.get("classname", "?").split(".")[-1]
    return f"engines: {file}: {case.get('name')}" if report == "e2e" else f"Python: {file}"


def read(paths: list[str]) -> dict[str, Row]:
    rows: dict[str, Row] = defaultdict(Row)
    for path in paths:
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            row = rows[suite_of(case, Path(path).stem)]
            row.seconds += float(case.get("time", 0))
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                row.failed += 1
            elif skipped is not None or case.get("status") in ("notrun", "disabled"):
                row.skipped += 1
                row.skipped_names.append(case.get("name", "?"))
            else:
                row.passed += 1
    return rows


def main() -> int:
    rows = read(sys.argv[1:])
    if not rows:
        print("no test reports were given: run make test-full", file=sys.stderr)
        return 2
    print("# The long test run\n")
    print("Written by `make test-full`, after its fuzzers found nothing. Seconds are those of the cases, summed.\n")
    print(f"{datetime.date.today()}, {platform.system()} {platform.machine()}.\n")
    print("| suite | passed | failed | skipped | seconds |\n| --- | --- | --- | --- | --- |")
    total = Row()
    for name, row in sorted(rows.items()):
        name = name.replace("|", "\\|")
        print(f"| {name} | {row.passed} | {row.failed} | {row.skipped} | {row.seconds:.1f} |")
        for part in ("passed", "failed", "skipped", "seconds"):
            setattr(total, part, getattr(total, part) + getattr(row, part))
    print(f"| **all** | **{total.passed}** | **{total.failed}** | **{total.skipped}** | **{total.seconds:.0f}** |")
    skipped_names = sorted(name for row in rows.values() for name in row.skipped_names)
    if skipped_names:
        print("\nSkipped (those named Cuda need a GPU): " + ", ".join(f"`{name}`" for name in skipped_names) + ".")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
