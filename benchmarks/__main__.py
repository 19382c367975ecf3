# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m benchmarks NAME [--json FILE] [--quick]`."""

import argparse
import importlib
import json
from pathlib import Path

from benchmarks.table import document, machine, machine_line

NAMES = (
    "push_fetch",
    "throughput",
    "accuracy",
    "rules",
    "memory",
    "partition",
    "figure_3",
    "sandblaster",
    "network",
    "failures",
)
HEAR_RECORDINGS = ("accuracy", "rules", "network")
NEED_RECORDINGS = ("accuracy", "rules")


def main(arguments: list[str] | None = None) -> None:
    """Run one benchmark, print its tables and, with --json, write its rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure distbelief beside its peers.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: under a minute, wider spread")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="accuracy, rules and network only: the Free Spoken Digit recordings, folder or tar",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="figure_3 only: draw it into this PNG file")
    options = parser.parse_args(arguments)
    for name in ("json", "picture"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name} {path}: there is no folder {path.absolute().parent}; create it first")
    if options.name in NEED_RECORDINGS and options.data is None:
        parser.error(f"{options.name} needs --data PATH: the Free Spoken Digit recordings, a folder or a tar")
    if options.name not in HEAR_RECORDINGS and options.data is not None:
        parser.error(f"{options.name} uses no recordings; leave --data out")
    if options.name != "figure_3" and options.picture is not None:
        parser.error(f"{options.name} draws nothing; leave --picture out")

    described = machine()
    print(machine_line(described), flush=True)
    benchmark = importlib.import_module(f"benchmarks.{options.name}")
    hears = options.name in HEAR_RECORDINGS
    rows = benchmark.run(options.data, options.quick) if hears else benchmark.run(options.quick)
    if options.json is not None:
        options.json.write_text(json.dumps(document(options.name, options.quick, described, rows), indent=1) + "\n")
        print(f"rows written to {options.json}")
    if options.picture is not None:
        benchmark.draw(rows, options.picture)
        print(f"drawn into {options.picture}")


if __name__ == "__main__":
    main()
