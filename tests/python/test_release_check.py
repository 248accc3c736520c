# SPDX-License-Identifier: Apache-2.0
"""What `make release-check` lets through, and what it says of the rest."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "release"))

import check_release  # noqa: E402

HEADER = "# SPDX-License-Identifier: Apache-2.0\n"
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-11-30\n\n- All of it.\n"


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Tester", "-c", "user.email=tester@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def commit(root: Path, tag: str) -> None:
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "release")
    git(root, "tag", tag)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    write(tmp_path / "python" / "zexpert" / "_version.py", f'{HEADER}__version__ = "1.2.3"\n')
    write(tmp_path / "CHANGELOG.md", CHANGELOG)
    write(tmp_path / ".gitignore", "/dist/\n")
    return tmp_path


def test_a_release_passes(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(repository, "v1.2.3")
    assert check_release.main([], repository) == 0
    assert capsys.readouterr().out == "release-check: zexpert 1.2.3 can be released\n"


@pytest.mark.parametrize(
    ("change", "tag", "problem"),
    [
        (
            lambda root: write(root / "python" / "zexpert" / "_version.py", f'{HEADER}__version__ = "1.2.3.dev0"\n'),
            "v1.2.3.dev0",
            "the version must be of the form X.Y.Z, got 1.2.3.dev0",
        ),
        (
            lambda root: write(root / "CHANGELOG.md", CHANGELOG.replace("1.2.3", "1.2.2")),
            "v1.2.3",
            'CHANGELOG.md must have a section "## [1.2.3] - YYYY-MM-DD"',
        ),
        (
            lambda root: write(root / "CHANGELOG.md", CHANGELOG.replace("## [1", "- More.\n\n## [1")),
            "v1.2.3",
            "CHANGELOG.md must have nothing under Unreleased",
        ),
        (
            lambda root: write(root / "csrc" / "new.h", "// What is new.\n\n" + HEADER.replace("#", "//")),
            "v1.2.3",
            'csrc/new.h must begin with a comment "SPDX-License-Identifier: Apache-2.0"',
        ),
        (lambda root: None, "v1.2.4", "HEAD must have the tag v1.2.3, got v1.2.4"),
    ],
)
def test_what_is_in_the_way(
    repository: Path,
    change: Callable[[Path], None],
    tag: str,
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(repository)
    commit(repository, tag)
    assert check_release.main([], repository) == 1
    assert f"release-check: {problem}\n" in capsys.readouterr().err


def test_the_working_tree_must_be_clean(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(repository, "v1.2.3")
    write(repository / "new.txt", "")
    assert check_release.main([], repository) == 1
    assert capsys.readouterr().err == (
        "release-check: the working tree must be clean, 1 files differ or are not in git\n"
    )


def test_archives(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(repository, "v1.2.3")
    assert check_release.main(["--built"], repository) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3

    dist = repository / "dist"
    licence = repository / "CHANGELOG.md"
    for folder, version in (("cpu", "1.2.3"), ("cuda", "1.2.2")):
        write(dist / folder / "keep", "")
        with zipfile.ZipFile(dist / folder / f"zexpert-{version}-cp311-cp311-linux_x86_64.whl", "w") as wheel:
            wheel.write(licence, f"zexpert-{version}.dist-info/licenses/LICENSE")
    with tarfile.open(dist / "zexpert-1.2.3.tar.gz", "w:gz") as sdist:
        sdist.add(licence, "zexpert-1.2.3/LICENSE")
    assert check_release.main(["--built"], repository) == 1
    assert capsys.readouterr().err == (
        "release-check: cuda/zexpert-1.2.2-cp311-cp311-linux_x86_64.whl must be of version 1.2.3\n"
    )


def test_this_repository_names_its_version_once() -> None:
    version = check_release.version_of(ROOT)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        assert f'"{version}"' not in (ROOT / name).read_text()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_every_source_file_of_this_repository_names_the_licence() -> None:
    assert not check_release.header_problems(ROOT)
