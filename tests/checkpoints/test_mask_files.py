import re

import pytest
import torch
from example_checkpoints import PRUNABLE, example_state, write_masked_ckpt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_llama

from lightning_prune import apply_masks
from lightning_prune.checkpoints.mask_files import export_masks, load_masks, save_masks
from lightning_prune.cli import main
from lightning_prune.errors import CheckpointError


def example_masks():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 5), "b.weight": (8, 8), "c.weight": (1, 1), "d.weight": (2, 3, 2, 2)}
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


def test_round_trip_at_one_bit_a_weight(tmp_path):
    masks = example_masks()
    save_masks(masks, tmp_path / "masks.safetensors", score="gblm")
    found = load_masks(tmp_path / "masks.safetensors")
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    stored = load_file(tmp_path / "masks.safetensors")
    assert {name: bits.numel() for name, bits in stored.items()} == {n: -(-m.numel() // 8) for n, m in masks.items()}
    with safe_open(tmp_path / "masks.safetensors", framework="pt") as handle:
        assert handle.metadata()["score"] == "gblm"


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}])
def test_masks_of_a_checkpoint(config, tmp_path):
    """Named as in the transformers model where there is one."""
    expected = {name: example_state()[name] != 0 for name in PRUNABLE}
    source = write_masked_ckpt(tmp_path, masks={f"model.{name}": mask for name, mask in expected.items()})
    if config:
        checkpoint = torch.load(source, weights_only=True)
        torch.save(checkpoint | {"hyper_parameters": {"config": config}}, source)
    assert export_masks(source, tmp_path / "masks.safetensors") == len(PRUNABLE)
    found = load_masks(tmp_path / "masks.safetensors")
    prefix = "" if config else "model."
    assert found.keys() == {prefix + name for name in PRUNABLE}
    assert all(torch.equal(found[prefix + name], mask) for name, mask in expected.items())


def test_masks_go_on_their_model_and_on_no_other(tmp_path):
    model = make_llama()
    masks = {n: torch.rand_like(p) < 0.5 for n, p in model.named_parameters() if "proj" in n}
    save_masks(masks, tmp_path / "masks.safetensors")
    found = load_masks(tmp_path / "masks.safetensors")
    apply_masks(model, found)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    other = make_llama(intermediate_size=64)
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(ValueError, match=r"gate_proj.* has shape"):
        apply_masks(other, found)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())


def test_files_that_hold_no_masks_or_damaged_ones(tmp_path):
    file = tmp_path / "masks.safetensors"
    save_file({"a": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match="holds tensors, but no masks"):
        load_masks(file)
    with pytest.raises(CheckpointError, match="not an existing file"):
        load_masks(tmp_path / "no.safetensors")
    save_masks(example_masks(), file)
    whole = file.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            load_masks(file)


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "masks.safetensors"
    save_masks(example_masks(), file)
    old = file.read_bytes()
    resource = pytest.importorskip("resource", reason="limits the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot be written"):
            save_masks({"big": torch.ones(300, 300, dtype=torch.bool)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == old
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        save_masks({"a": torch.ones(2)}, file)


def test_command(tmp_path, capsys):
    source = write_masked_ckpt(tmp_path)
    target = tmp_path / "masks.safetensors"
    command = ["export", str(source), str(target), "--masks_only"]
    assert main(command) == 0
    assert f"{len(PRUNABLE)} masks written" in capsys.readouterr().out
    assert load_masks(target).keys() == PRUNABLE
    plain = tmp_path / "plain.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": example_state()}, plain)
    for wrong, message in [
        (command, "exists; give the name of a new file"),
        (["export", str(source), str(tmp_path), "--masks_only"], "is a folder"),
        ([*command, "--overwrite", "--dtype", "float16"], "--dtype says how to write a model"),
        (["export", str(plain), str(tmp_path / "new"), "--masks_only"], "holds no masks"),
    ]:
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main([*command, "--overwrite"]) == 0


def test_overwrite_takes_nothing_away_but_masks(tmp_path):
    """Weights, which are safetensors too, and texts stay."""
    source = write_masked_ckpt(tmp_path)
    weights, text, empty = tmp_path / "model.safetensors", tmp_path / "notes.txt", tmp_path / "empty"
    save_file(example_state(), weights)
    text.write_text("mine")
    for file in (weights, text):
        before = file.read_bytes()
        with pytest.raises(ValueError, match=rf"output='.*{file.name}' holds other things than masks, .* new file"):
            export_masks(source, file, overwrite=True)
        assert file.read_bytes() == before
    empty.touch()
    for _ in range(2):
        export_masks(source, empty, overwrite=True)
        assert load_masks(empty).keys() == PRUNABLE
