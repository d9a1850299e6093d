"""Writes the report.html of a run again, from the files in its folder.

python tools/report.py runs/mnist_sba
"""

import argparse
import sys
from pathlib import Path

from ratiograph.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, nargs="+", help="folder of a run, finished or still training")
    for workdir in parser.parse_args().workdir:
        try:
            print(write_report(workdir))
        except (ValueError, OSError) as error:
            print(f"report: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
