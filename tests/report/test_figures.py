import matplotlib.figure
import matplotlib.image
import pytest
import torch
from safetensors.torch import save_file

from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.report.figures import sparsity_per_layer

KINDS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    original = matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **kwargs):
        saved.append(figure)
        original(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def masks(blocks):
    """The share of zeros differs from layer to layer: element i of layer j is kept where i % (j + 2) is not 0."""
    names = [f"model.layers.{b}.{kind}.weight" for b in range(blocks) for kind in KINDS]
    return {name: (torch.arange(240) % (j % 5 + 2) != 0).view(12, 20) for j, name in enumerate(names)}


def expected(found, kind):
    return [(~m).double().mean().item() for name, m in found.items() if f".{kind}." in name]


def test_bars_have_the_heights_of_the_masks(figures, tmp_path):
    found = masks(4)
    # the order in which layers are given does not matter
    path = sparsity_per_layer(dict(sorted(found.items(), reverse=True)), tmp_path / "new" / "a.png", "gblm")
    axes = figures[0].axes[0]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {kind.split(".")[1]: pytest.approx(expected(found, kind)) for kind in KINDS}
    total = sum(int((~m).sum()) for m in found.values()) / sum(m.numel() for m in found.values())
    assert f"gblm: {total:.2%} of 2.88 k weights are zero" == axes.get_title(loc="left")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert matplotlib.image.imread(path).shape[:2] == (630, 1350)


def test_many_blocks_become_lines_in_the_order_of_numbers(figures, tmp_path):
    found = masks(30)
    sparsity_per_layer(found, tmp_path / "a.svg")
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines}
    for kind in KINDS:
        assert lines[kind.split(".")[1]] == pytest.approx(expected(found, kind))
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_an_inspection_draws_the_same_as_its_masks(figures, tmp_path):
    found = masks(3)
    state = {name: mask.float() for name, mask in found.items()} | {"lm_head.weight": torch.zeros(4, 4)}
    save_file(state, tmp_path / "model.safetensors")
    sparsity_per_layer(inspect(tmp_path), tmp_path / "a.png")
    sparsity_per_layer(found, tmp_path / "b.png")
    first, second = ([[b.get_height() for b in bars] for bars in f.axes[0].containers] for f in figures)
    assert first == second
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_layers_without_blocks(figures, tmp_path):
    sparsity_per_layer({"fc.weight": torch.zeros(4, 4, dtype=torch.bool)}, tmp_path / "a.png")
    assert figures[0].axes[0].get_title(loc="left") == "100.00% of 16 weights are zero"
    with pytest.raises(ValueError, match="no prunable weights"):
        sparsity_per_layer({}, tmp_path / "b.png")
