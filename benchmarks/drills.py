"""Process faults in real torchrun jobs: what is told of each, and how soon. The drills are tests; this runs all seeds.

``results/drills.json`` has a row for each fault and seed. A drill that fails is a row without seconds, and exit code 1.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.results_file import spread, write

ROOT = Path(__file__).resolve().parent.parent
DRILLS = "tests/distributed/test_drills.py"


def main(*chosen: str) -> int:
    """Runs them, or those that options of pytest choose."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "drills.xml"
        words = [
            DRILLS,
            "-m",
            "torchrun",
            "--numprocesses",
            "2",
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
            *chosen,
        ]
        code = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, check=False).returncode
        rows = [row(case) for case in ElementTree.parse(report).iter("testcase")]
    faults: dict[str, Any] = {}
    for each in sorted(rows, key=lambda each: (each["fault"], each["seed"])):
        faults.setdefault(each["fault"], []).append(each)
    told = {
        fault: spread([each["seconds"] for each in trials if "seconds" in each])
        for fault, trials in faults.items()
        if any("seconds" in each for each in trials)
    }
    write("drills", {"trials": faults, "seconds_to_detect": told})
    return code


def row(case: ElementTree.Element) -> dict[str, Any]:
    """One test of pytest's report, with what the drill has recorded."""
    named = re.fullmatch(r".*\[(\w+)-(\d+)\]", case.get("name", ""))
    assert named is not None, case.get("name")
    recorded = {each.get("name", ""): each.get("value", "").replace(f"{ROOT}/", "") for each in case.iter("property")}
    passed = not any(each.tag in ("failure", "error", "skipped") for each in case)
    found: dict[str, Any] = {"fault": named[1], "seed": int(named[2]), "passed": passed, **recorded}
    return {**found, "seconds": float(found["seconds"])} if "seconds" in found else found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
