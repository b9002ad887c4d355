import io

from example_checkpoints import example_state, write_folder, write_masked_ckpt
from rich.console import Console

from lightning_prune.checkpoints.inspection import inspect, render


def text_of(inspection, all_tensors=False, width=160):
    out = io.StringIO()
    render(inspection, Console(file=out, width=width), all_tensors)
    return out.getvalue()


def test_tables(tmp_path):
    inspection = inspect(write_folder(tmp_path, example_state()))
    text = text_of(inspection)
    assert f"{inspection.sparsity:.2%}" in text
    assert "by block of model.layers" in text
    assert "lm_head" not in text
    everything = text_of(inspection, all_tensors=True)
    assert "lm_head.weight" in everything
    assert "16x24" in everything
    assert text_of(inspection, width=60)


def test_masks_are_one_line(tmp_path):
    def change(state):
        state["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e-30

    assert "Masks kept" in text_of(inspect(write_masked_ckpt(tmp_path)))
    assert "Masks broken" in text_of(inspect(write_masked_ckpt(tmp_path, change)))
