"""The picture of a shrinking model, and the records it is drawn from."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_prune.report.figures import shrinking_picture
from lightning_prune.structure.shrinking import ShrinkRecord, pruned_ratios


def example(steps: int = 60) -> list[ShrinkRecord]:
    units = {"attention": 9, "ffn": 1536, "hidden": 576}
    records = [ShrinkRecord(0, 0, 134_515_008, dict(units), {})]
    for i in range(1, steps):
        saliency = {"attention": 1e-7 * 1.05**i, "ffn": 3e-7 * 1.02**i, "hidden": 8e-7}
        kind = min(saliency, key=lambda k: saliency[k])
        units[kind] -= {"attention": 1 if i % 15 == 0 else 0, "ffn": 12, "hidden": 2}[kind]
        records.append(ShrinkRecord(i, i * 65_536, 134_515_008 - i * 900_000, dict(units), saliency))
    return records


def test_records_survive_as_plain_values() -> None:
    for record in example(4):
        assert ShrinkRecord.from_dict(record.to_dict()) == record


def test_ratios_are_shares_of_the_first_sizes() -> None:
    first = ShrinkRecord(0, 0, 10, {"ffn": 8, "hidden": 4}, {})
    assert pruned_ratios(ShrinkRecord(1, 5, 8, {"ffn": 6, "hidden": 4}, {}), first) == {"ffn": 0.25, "hidden": 0.0}


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture_is_written(ending: str, tmp_path: Path) -> None:
    path = shrinking_picture(example(), tmp_path / "deep" / f"shrink.{ending}", "SmolLM2-135M")
    assert path.stat().st_size > 10_000
    if ending == "svg":
        assert path.read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_nothing_pruned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was pruned"):
        shrinking_picture(example(1), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
