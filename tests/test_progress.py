"""Progress bars are seen in a terminal, and nowhere else: not in a log, not on ranks other than 0."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

import progress_worker
import pytest
from forking import start
from tiny import clean_environment

from lightning_prune.progress import is_main_process, progress_bar, warn

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
SHOWN = (
    "Calibrating (forward + backward)", "Calibrating (forward)", "Selecting", "Pruning blocks", "Reconstructing blocks",
    "Compensating", "Perplexity", "Reading weights", "Checking what was written", "Counting zeros",
)  # fmt: skip


class Worker:
    """A process whose stderr is a terminal, or a pipe."""

    def __init__(self, folder: Path, terminal: bool, **variables: str) -> None:
        folder.mkdir()
        if terminal:
            self.reader, writer = pty.openpty()
            log = Path(os.ttyname(writer))
        else:
            log = folder / "log"
            os.mkfifo(log)
            self.reader, writer = os.open(log, os.O_RDONLY | os.O_NONBLOCK), os.open(log, os.O_WRONLY)
            os.set_blocking(self.reader, True)
        environment = {k: v for k, v in clean_environment().items() if k not in ("FORCE_COLOR", "TTY_INTERACTIVE")}
        environment |= {"TERM": "xterm", "COLUMNS": "120"} | variables
        self.process = start(progress_worker.run, folder, environment=environment, log=log)
        self.writer = writer

    def stderr(self) -> str:
        """All that was written, once the process has ended well."""
        written: list[bytes] = []
        reading = Thread(target=lambda: written.extend(iter(self._read, b"")))
        reading.start()
        self.process.join(120)
        os.close(self.writer)  # nobody writes any more, so reading comes to its end
        reading.join()
        os.close(self.reader)
        said = b"".join(written).decode(errors="replace")
        assert self.process.exitcode == 0, said
        return said

    def _read(self) -> bytes:
        try:
            return os.read(self.reader, 1 << 16)
        except OSError:  # Linux says so when the other end of a terminal is closed
            return b""


@pytest.mark.slow
def test_a_log_shows_nothing(tmp_path: Path) -> None:
    # With these rich takes any stream for a terminal.
    assert Worker(tmp_path / "run", terminal=False, FORCE_COLOR="1", TTY_COMPATIBLE="1").stderr() == ""


@pytest.mark.slow
def test_a_process_that_is_to_become_another_rank_shows_nothing(tmp_path: Path) -> None:
    assert Worker(tmp_path / "run", terminal=True, LOCAL_RANK="1").stderr() == ""


@pytest.mark.slow
def test_in_a_terminal_the_first_of_two_ranks_shows_every_bar(tmp_path: Path) -> None:
    workers = [Worker(tmp_path / str(rank), terminal=True, WORLD_SIZE="2", RANK=str(rank)) for rank in range(2)]
    first, second = (worker.stderr() for worker in workers)
    assert [name for name in SHOWN if name not in first] == []
    assert "\x1b" in first
    assert second == ""


def test_the_group_says_more_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert is_main_process()
    for name in names:
        monkeypatch.setenv(name, "1")
        assert not is_main_process()
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "4")  # the first process of a second node
    assert not is_main_process()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    assert is_main_process()


def test_all_ranks_warn_once(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        warn("the same on each")
        warn("")
    (seen,) = recwarn
    assert (str(seen.message), seen.filename) == ("the same on each", __file__)


def test_a_bar_that_is_not_shown_can_be_told_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Waiting", 3) as advance:
        advance()
        advance(2)
    with progress_bar("Waiting", 3, enabled=False) as advance:
        advance()
    assert capsys.readouterr() == ("", "")
