"""What is shipped, what it needs, and what is said where a dependency is broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Files of the package that are not modules.
DATA = {"py.typed", "text/embedded/austen.txt", "text/embedded/README.md", "report/templates/report.html.jinja",
        "report/templates/style.css"}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str], str]:
    """Names in the wheel and in the sdist, and the wheel's metadata; from the files that git knows."""
    setuptools = pytest.importorskip("setuptools", "77")
    source, out = tmp_path_factory.mktemp("source") / "lightning_prune", tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if names.returncode != 0:
        pytest.skip("not a clone of the repository")
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    assert setuptools is not None
    call = f"import setuptools.build_meta as b; print(b.build_wheel({str(out)!r}), b.build_sdist({str(out)!r}))"
    subprocess.run([sys.executable, "-c", call], cwd=source, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        inside, said = set(archive.namelist()), archive.read(metadata).decode()
    with tarfile.open(sdist) as archive:
        return inside, {name.partition("/")[2] for name in archive.getnames()}, said


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built: tuple[set[str], set[str], str]) -> None:
    inside, source, _ = built
    package = ROOT / "lightning_prune"
    modules = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    wanted = modules | {f"lightning_prune/{name}" for name in DATA}
    assert {name for name in inside if ".dist-info/" not in name} == wanted
    assert wanted <= source
    assert {"LICENSE", "README.md", "pyproject.toml"} <= source
    assert not any(name.startswith("runs/") or name.endswith((".ckpt", ".gguf")) for name in source)


def test_metadata_is_complete(built: tuple[set[str], set[str], str]) -> None:
    said = built[2]
    for line in ("Name: lightning-prune", f"Version: {PROJECT['version']}", "License-Expression: Apache-2.0",
                 "Author: lightning_prune developers", "Requires-Python: >=3.10", "License-File: LICENSE"):  # fmt: skip
        assert f"\n{line}\n" in said
    assert "\nKeywords: " in said
    assert "Classifier: Programming Language :: Python :: 3.13" in said
    assert "# lightning_prune" in said  # the README


def test_the_version_is_in_one_place() -> None:
    named = re.compile(rf"(?<![\d.]){re.escape(PROJECT['version'])}(?![\d.])")
    texts = [ROOT / "pyproject.toml", *(ROOT / "lightning_prune").rglob("*.py")]
    assert [path.name for path in texts if named.search(path.read_text(encoding="utf-8"))] == ["pyproject.toml"]
    assert f"## {PROJECT['version']}" in (ROOT / "notebooks/docs/pages/changelog.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("extra", ["lowest", "pinned"])
def test_every_dependency_has_a_tested_version(extra: str) -> None:
    """Every lower bound is a version that CI runs with; what is pinned is allowed."""
    bounds = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    exact = {r.name: r for r in map(Requirement, PROJECT["optional-dependencies"][extra])}
    assert bounds.keys() == exact.keys()
    for name, bound in bounds.items():
        ((least,), (only,)) = bound.specifier, exact[name].specifier
        assert (least.operator, only.operator) == (">=", "==")
        assert least.contains(only.version), name
        if extra == "lowest":
            assert least.version == only.version, name


@pytest.mark.parametrize("error", ["ImportError", "AttributeError", "RuntimeError"])
def test_a_broken_dependency_shows_its_own_error(error: str, tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text(f"raise {error}('the C library of datasets is too old')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", "from lightning_prune import TextDataModule"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "the C library of datasets is too old" in last
    assert "cannot import name" not in done.stderr
