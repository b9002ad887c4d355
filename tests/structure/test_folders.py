"""One folder takes the place of another, or is moved into it; killed at any moment, the old or the new is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import killed_at_every_operation

from lightning_prune.structure import folders
from lightning_prune.structure.folders import replacing

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of POSIX")


def write(folder: Path, version: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(version)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_an_export_that_is_replaced(keep, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    write(target, "old")
    if keep:
        (target / "notes.txt").write_text("mine")
    seen = set()

    def replace() -> None:
        with replacing(target, overwrite=True, keep=keep) as folder:
            write(folder, "new")

    def check() -> None:
        assert not keep or (target / "notes.txt").read_text() == "mine"
        versions = {(target / name).read_text() for name in ("config.json", "model.safetensors")}
        assert versions in ({"old"}, {"new"})
        seen.update(versions)

    assert killed_at_every_operation(replace, check) > 8
    assert seen == {"old", "new"}


def test_where_the_file_system_cannot_exchange(tmp_path, monkeypatch):
    """Two renamings then; a failure of the second puts the old one back."""
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    target = tmp_path / "model"
    target.mkdir()
    write(target, "old")
    with replacing(target, overwrite=True) as folder:
        write(folder, "new")
    assert (target / "config.json").read_text() == "new"
    rename = os.replace

    def fails(source: Any, destination: Any) -> None:
        if Path(source).name == "new":
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no"), replacing(target, overwrite=True) as folder:
        write(folder, "newer")
    assert (target / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def refuse(error: Exception) -> Callable[..., Any]:
    def refused(*args: Any, **options: Any) -> Any:
        raise error

    return refused


@pytest.mark.parametrize("why", ["no links", "no such links", "busy", "of others", "saved meanwhile"])
def test_a_folder_that_cannot_be_exchanged_is_written_into(why, tmp_path, monkeypatch):
    """What others have open there stays the file that they write to."""
    target = tmp_path / "model"
    target.mkdir()
    write(target, "old")
    (target / "model-00001-of-00002.safetensors").write_text("old")
    rename, status, inode = os.replace, Path.stat, target.stat().st_ino
    if why == "no links":  # of the file system
        monkeypatch.setattr(os, "link", refuse(PermissionError(1, "Operation not permitted")))
    elif why == "no such links":  # of the operating system
        monkeypatch.setattr(os, "link", refuse(NotImplementedError("follow_symlinks")))
    elif why == "busy":
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
        busy = refuse(PermissionError(13, "Permission denied"))
        monkeypatch.setattr(os, "replace", lambda a, b: busy() if Path(a) == target else rename(a, b))
    elif why == "of others":  # as in a folder that a group shares

        def of_others(path: Path, **options: Any) -> os.stat_result:
            found = status(path, **options)
            return os.stat_result((*found[:5], found.st_gid + (path == target), *found[6:]))

        monkeypatch.setattr(Path, "stat", of_others)
    else:  # by another process, after this one has found nothing there
        target.rename(tmp_path / "kept")

        def late(a: Any, b: Any) -> None:
            if not target.exists():
                (tmp_path / "kept").rename(target)
            rename(a, b)

        monkeypatch.setattr(os, "replace", late)
    log = (target if target.exists() else tmp_path / "kept") / "train.log"
    with log.open("w", buffering=1) as running:
        running.write("before\n")
        with replacing(target, overwrite=True, keep=True) as folder:
            write(folder, "new")
        running.write("after\n")
    assert (target / "train.log").read_text() == "before\nafter\n"
    assert {(target / name).read_text() for name in ("config.json", "model.safetensors")} == {"new"}
    assert len(list(target.iterdir())) == 3
    assert target.stat().st_ino == inode
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_private_folder_stays_private(keep, tmp_path):
    target = tmp_path / "model"
    target.mkdir(mode=0o700)
    write(target, "old")
    inode = target.stat().st_ino
    with replacing(target, overwrite=True, keep=keep) as folder:
        write(folder, "new")
    assert target.stat().st_ino != inode
    assert target.stat().st_mode & 0o777 == 0o700
