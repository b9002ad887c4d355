"""FSDP2 with two real processes: saliencies and masks are those of one process on all samples."""

import pytest
import structure_worker as worker
import torch
from launching import launch_calls
from safetensors.torch import load_file

from lightning_prune.structure.masking import unit_masks

pytestmark = pytest.mark.distributed


NAMES = ("llama", "gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes wrote; they are started once, since starting takes longest."""
    path = tmp_path_factory.mktemp("sharded")
    done = launch_calls(2, worker.run_sharded, [(NAMES, 2, path)])
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one_process(name, folder):
    one = worker.run(name, sharded=False)
    masks = unit_masks(worker.zoo.make(name), worker.REMOVAL)
    for rank in (0, 1):
        got = load_file(folder / f"{name}{rank}.safetensors")
        assert bool(got.pop("refused"))
        assert set(got) == set(one)
        for key, value in one.items():
            atol = {"logits": 2e-4, "weight": 1e-5}.get(key.partition(".")[0], 1e-9)
            torch.testing.assert_close(got[key], value, atol=atol, rtol=1e-3, msg=key)
        for n, mask in masks.items():
            assert bool((got[f"weight.{n}"][~mask] == 0).all())
            assert bool((got[f"weight.{n}"][mask] != 0).any())
