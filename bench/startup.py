"""Start-up: wall seconds of `foreword --help` and `import foreword` as whole processes, beside a bare Python.

python bench/startup.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hardware import describe

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import foreword": [sys.executable, "-c", "import foreword, sys; assert 'torch' not in sys.modules"],
    "foreword --help": [sys.executable, "-m", "foreword", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(7):
        for name, command in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - begin)
    medians = {name: round(statistics.median(taken), 3) for name, taken in times.items()}
    result = {"what": "start-up, median of 7 whole processes, seconds", "hardware": describe(), "median_s": medians}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
