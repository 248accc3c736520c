# SPDX-License-Identifier: Apache-2.0
"""Whether this commit can be released: prints what is in the way and exits with 1, or says that nothing is.

Checks that the version is a release's and has a section in CHANGELOG.md, that every source file names the licence, that
the working tree is clean, and that the tag of the version is on this commit. With --built also what `make test-all`
left in dist: an sdist and wheels of this version, each with the licence.

Usage: python check_release.py [--built]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LICENCE_LINE = "SPDX-License-Identifier: Apache-2.0"
SOURCES = (
    "*.py",
    "*.pyi",
    "*.h",
    "*.cpp",
    "*.cu",
    "*.cuh",
    "*.cmake",
    "*CMakeLists.txt",
    "*.sh",
    "*.h.in",
    "*.cmake.in",
)


def git(root: Path, *arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()


def version_of(root: Path) -> str:
    text = (root / "python" / "zexpert" / "_version.py").read_text()
    return re.findall(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)[0]


def header_problems(root: Path) -> list[str]:
    """The source files in git without the licence in their first two lines."""
    return [
        f'{name} must begin with a comment "{LICENCE_LINE}"'
        for name in git(root, "ls-files", *SOURCES)
        if not any(LICENCE_LINE in line for line in (root / name).read_text().splitlines()[:2])
    ]


def source_problems(root: Path) -> list[str]:
    version, problems = version_of(root), []
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        problems.append(f"the version must be of the form X.Y.Z, got {version}")

    changelog = (root / "CHANGELOG.md").read_text()
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, flags=re.MULTILINE):
        problems.append(f'CHANGELOG.md must have a section "## [{version}] - YYYY-MM-DD"')
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", changelog, flags=re.MULTILINE | re.DOTALL)
    if unreleased and unreleased[1].strip():
        problems.append("CHANGELOG.md must have nothing under Unreleased")

    problems += header_problems(root)

    changed = git(root, "status", "--porcelain")
    if changed:
        problems.append(f"the working tree must be clean, {len(changed)} files differ or are not in git")
    tags = git(root, "tag", "--points-at", "HEAD")
    if f"v{version}" not in tags:
        problems.append(f"HEAD must have the tag v{version}, got {', '.join(tags) or 'none'}")
    return problems


def archive_problems(root: Path) -> list[str]:
    version, dist, problems = version_of(root), root / "dist", []
    wheels = sorted(dist.glob("c*/*.whl"))
    sdist = dist / f"zexpert-{version}.tar.gz"
    if not sdist.exists():
        problems.append(f"dist must have the sdist {sdist.name}")
    else:
        with tarfile.open(sdist) as archive:
            if f"zexpert-{version}/LICENSE" not in archive.getnames():
                problems.append(f"{sdist.name} must have the LICENSE")
    missing = {"cpu", "cuda"} - {wheel.parent.name for wheel in wheels}
    problems += [f"dist/{folder} must have a wheel" for folder in sorted(missing)]
    for wheel in wheels:
        if not wheel.name.startswith(f"zexpert-{version}-"):
            problems.append(f"{wheel.parent.name}/{wheel.name} must be of version {version}")
        with zipfile.ZipFile(wheel) as archive:
            if not any(re.fullmatch(r"zexpert-.+\.dist-info/licenses/LICENSE", name) for name in archive.namelist()):
                problems.append(f"{wheel.parent.name}/{wheel.name} must have the LICENSE")
    return problems


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--built", action="store_true", help="look at what is in dist, too")
    problems = source_problems(root)
    if parser.parse_args(arguments).built:
        problems += archive_problems(root)
    for problem in problems:
        print(f"release-check: {problem}", file=sys.stderr)
    if not problems:
        print(f"release-check: zexpert {version_of(root)} can be released")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
