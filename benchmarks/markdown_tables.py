# SPDX-License-Identifier: Apache-2.0
"""Turns the JSON files of the benchmarks into tables.

Usage: python benchmarks/markdown_tables.py FILE.json|PAGE.md [...]

Prints the tables of a JSON file. In a page, such as docs/performance.md, writes anew what stands between
<!-- table: NAME.json --> and <!-- end of table -->, from the file of that name in the page's folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zexpert_tools.benchmark import harness


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(environment: dict[str, Any]) -> str:
    """Date, what was measured, versions and commit: the GPU with its host, or the processor."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    if "git_revision" in environment:
        versions += f", commit {environment['git_revision']}"
    processor, cores = environment["processor"], f"{environment['cores']} cores"
    if "gpu" in environment:
        memory = f", {environment['gpu_memory_bytes'] / 2**30:.0f} GiB" if "gpu_memory_bytes" in environment else ""
        measured = f"{environment['gpu']}{memory}; its host {processor}, {cores}"
    else:
        cache = environment["last_level_cache_bytes"] >> 20
        measured = f"{processor} ({', '.join(environment['features'])}), {cores}, {cache} MiB last-level cache"
    return f"{environment['date'][:10]}; {measured}; {versions}."


def contender_names(results: Sequence[dict[str, Any]]) -> list[str]:
    """Every contender of any case, in the order in which they come up."""
    return list(dict.fromkeys(name for result in results for name in result["timings_s"]))


def case_row(result: dict[str, Any], names: Sequence[str]) -> list[str]:
    timings = {name: timing["median"] for name, timing in result["timings_s"].items()}
    subject = result["subject"]
    row = [result["case"], harness.format_seconds(result["floor_s"])]
    for name in names:
        if name not in timings:
            row.append("")
        elif name == subject:
            row.append(f"**{harness.format_seconds(timings[name])}** ({100 * result['floor_s'] / timings[name]:.0f}%)")
        else:
            row.append(f"{harness.format_seconds(timings[name])} ({timings[name] / timings[subject]:.2f}x)")
    target = result["target"]
    verdict = "" if target is None else f"{target['at_least']:g}x {'met' if target['met'] else 'missed'}"
    return [*row, verdict]


def report(benchmark: dict[str, Any]) -> str:
    results = benchmark["results"]
    names = contender_names(results)
    lines = table(["case", "floor", *names, "target"], [case_row(result, names) for result in results])
    return f"{machine(benchmark['environment'])}\n\n{lines}\n"


def with_tables(page: str, folder: Path) -> str:
    """The text of a page in `folder`, its tables made anew. OSError or ValueError for a file that cannot be read."""

    def table_of(marked: re.Match[str]) -> str:
        benchmark = json.loads((folder / marked[2]).read_text())
        return f"{marked[1]}\n\n{report(benchmark)}\n{marked[3]}"

    return re.sub(r"(<!-- table: (\S+) -->).*?(<!-- end of table -->)", table_of, page, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE.json|PAGE.md")
    for path in parser.parse_args(arguments).paths:
        try:
            if path.suffix == ".md":
                path.write_text(with_tables(path.read_text(), path.parent))
                continue
            benchmark = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            print(f"markdown_tables.py: cannot read {path}: {error}", file=sys.stderr)
            return 2
        print(f"### {benchmark['benchmark']}\n\n{report(benchmark)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
