"""Turns the JUnit files of `make test-full` into the table of docs/test-full.md.

python tools/test_summary.py build/reports/*.xml > docs/test-full.md
"""

import datetime
import platform
import re
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
    reasons: set[str] = field(default_factory=set)


def suite_of(case: ElementTree.Element, report: str) -> str:
    """The file of a Python test, the first word of a C++ test's name."""
    name = case.get("classname", "")
    if name.startswith("tests."):
        return name.replace(".", "/") + ".py"
    return f"{report}: {re.split(r'[./]', case.get('name', '?'))[0]}"


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
                row.reasons.add((skipped.get("message") or "") if skipped is not None else "")
            else:
                row.passed += 1
    return rows


def main() -> int:
    rows = read(sys.argv[1:])
    if not rows:
        print("no test reports were given: run make test-full", file=sys.stderr)
        return 2
    print("# The long test run\n")
    print("Written by `make test-full`. C++ suites are grouped by name, Python tests by file; seconds are those of the")
    print("cases, summed.\n")
    print(f"{datetime.date.today()}, {platform.system()} {platform.machine()}.\n")
    print("| suite | passed | failed | skipped | seconds |\n| --- | --- | --- | --- | --- |")
    total = Row()
    for name, row in sorted(rows.items()):
        print(f"| {name} | {row.passed} | {row.failed} | {row.skipped} | {row.seconds:.1f} |")
        for part in ("passed", "failed", "skipped", "seconds"):
            setattr(total, part, getattr(total, part) + getattr(row, part))
    print(f"| **all** | **{total.passed}** | **{total.failed}** | **{total.skipped}** | **{total.seconds:.0f}** |")
    reasons = sorted({reason for row in rows.values() for reason in row.reasons if reason})
    if reasons:
        print("\nSkipped because: " + "; ".join(reasons) + ".")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
