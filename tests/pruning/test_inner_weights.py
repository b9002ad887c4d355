"""Weights that are no Linear's: Conv1d, and the matrices inside of MultiheadAttention, LSTM, GRU and RNN."""

import lightning as L
import naive
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import WeightPruning, inspect, measure_coverage, prune
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import ALL_STATISTICS
from lightning_prune.pruning.targets import CONVOLUTION1D, INNER, find_targets, select_layers

# -- Conv1d


@pytest.mark.parametrize(
    "how",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"padding": 2, "padding_mode": "circular"}],
)
def test_statistics_of_conv1d_are_those_of_conv2d_of_one_row(how):
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 3, **how).double()
    flat = nn.Conv2d(4, 6, (1, 3), **{k: v if isinstance(v, str) else (0 if k == "padding" else 1, v)
                                      for k, v in how.items()}).double()  # fmt: skip
    with torch.no_grad():
        flat.weight.copy_(layer.weight[:, :, None])
        flat.bias.copy_(layer.bias)
    samples = [torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(2)]
    (target,) = find_targets(nn.Sequential(layer))
    assert target.kind is CONVOLUTION1D
    assert target.shape == (6, 12)

    def loss(model, batch):
        return model(batch).square().flatten(1).mean(1)

    ours = collect(nn.Sequential(layer), samples, [target], ALL_STATISTICS, loss_fn=loss, num_samples=6, progress=False)
    model = nn.Sequential(flat)
    theirs = collect(model, [x[:, :, None] for x in samples], find_targets(model), ALL_STATISTICS, loss_fn=loss,
                     num_samples=6, progress=False)  # fmt: skip
    for name in ALL_STATISTICS:
        torch.testing.assert_close(ours["0.weight"].get(name), theirs["0.weight"].get(name))


def test_statistics_of_conv1d_by_hand():
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 5, 3, stride=2, dilation=2).double()
    x = torch.randn(1, 3, 12).double()
    found = collect(
        nn.Sequential(layer), [x], find_targets(nn.Sequential(layer)), ALL_STATISTICS, num_samples=1,
        loss_fn=lambda m, b: m(b).square().sum(), progress=False,
    )["0.weight"]  # fmt: skip
    rows = torch.stack([x[0, :, start : start + 5 : 2].t().reshape(-1) for start in range(0, 8, 2)])
    delta = 2 * layer(x)[0].t().detach()
    torch.testing.assert_close(found.hessian, rows.t() @ rows)
    torch.testing.assert_close(found.input_norm, rows.square().sum(0).sqrt())
    torch.testing.assert_close(found.output_grad_norm, delta.square().sum(0).sqrt())
    torch.testing.assert_close(found.gradient_l1, (delta.t() @ rows).abs())


@pytest.mark.parametrize("update", [None, "exact", "alps"])
def test_conv1d_groups_run_along_the_channels(update):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
    x = torch.randn(6, 8, 8)
    loss = lambda m, b: m(b).square().mean(1)  # noqa: E731
    masks = prune(model, [x], "wanda", pattern="2:4", num_samples=6, loss_fn=loss, update=update, progress=False)
    assert (masks["0.weight"].unflatten(1, (2, 4)).sum(2) == 2).all()
    assert torch.equal(model[0].weight != 0, masks["0.weight"])


def test_grouped_convolutions_are_left_out_where_inputs_are_asked_for():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(8, 4))
    assert select_layers(model, called=True).left_out == {"0": "grouped convolution"}
    x, loss = torch.randn(2, 4, 4), lambda m, b: m(b).square().mean(1)
    with pytest.warns(UserWarning, match=r"\*\.weight \(1 tensor, .*\): grouped convolution"):
        masks = prune(model, [x], "wanda", num_samples=2, loss_fn=loss, progress=False)
    assert list(masks) == ["2.weight"]
    with pytest.raises(ValueError, match=r"'0\.weight' is a grouped convolution"):
        prune(model, [x], "wanda", targets=["0", "2"], progress=False)
    assert list(prune(model, score="magnitude")) == ["0.weight", "2.weight"]


def test_a_conv1d_with_a_weight_norm_is_left_out_and_named():
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    model = nn.ModuleDict({"position": normed, "proj": nn.Linear(4, 4)})
    assert [t.name for t in find_targets(model)] == ["proj.weight"]
    assert "position.parametrizations.weight.original1 (1 tensor" in str(measure_coverage(model))


# -- inside of attention and recurrent layers

INNER_MODELS = {
    "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "cross attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=12, batch_first=True),
    "lstm": lambda: nn.LSTM(8, 16, 2, bidirectional=True, batch_first=True),
    "projected lstm": lambda: nn.LSTM(8, 16, proj_size=4, batch_first=True),
    "gru": lambda: nn.GRU(8, 16, batch_first=True),
    "cell": lambda: nn.LSTMCell(8, 16),
}


def inner_names(module):
    return {n for n, p in module.named_parameters() if p.dim() == 2 and n != "out_proj.weight"}


@pytest.mark.parametrize("name", INNER_MODELS)
@pytest.mark.parametrize("how", [{}, {"pattern": "2:4"}, {"group": "row"}, {"group": "global"}])
def test_magnitude_reaches_inner_weights(name, how):
    torch.manual_seed(0)
    model = INNER_MODELS[name]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = prune(model, score="magnitude", progress=False, **how)
    assert masks.keys() >= inner_names(model)
    for target in find_targets(model):
        if target.kind is not INNER:
            continue
        mask, scores = masks[target.name], before[target.name].abs().numpy()
        assert torch.equal(dict(model.named_parameters())[target.name] != 0, mask)
        if how.get("group") == "global":
            continue
        expected = {
            "pattern": lambda s: naive.nm_mask(s, 2, 4),
            "group": lambda s: naive.row_mask(s, s.size // 2),
        }.get(next(iter(how), ""), lambda s: naive.layer_mask(s, s.size // 2))(scores)
        assert (mask.numpy() == expected).all(), target.name
    assert measure_coverage(model).share == 1.0


@pytest.mark.parametrize("name", INNER_MODELS)
def test_scores_from_data_leave_inner_weights_out_and_say_so(name):
    model = nn.ModuleDict({"inner": INNER_MODELS[name](), "proj": nn.Linear(8, 8)})
    left = select_layers(model, called=True).left_out
    assert left.keys() >= {f"inner.{n}" for n in inner_names(model["inner"])}
    assert set(left.values()) == {"used functionally"}
    with pytest.warns(UserWarning, match=r"inner\..* used functionally"):
        masks = prune(model, [torch.randn(2, 8)], "wanda", num_samples=2, progress=False,
                      loss_fn=lambda m, b: m["proj"](b).square().mean(1))  # fmt: skip
    assert list(masks) == ["proj.weight"]
    named = sorted(inner_names(model["inner"]))[0]
    with pytest.raises(ValueError, match=rf"'inner.{named}' is multiplied inside of \w+, .*score='magnitude'"):
        prune(model, [torch.randn(2, 8)], "wanda", targets=[named], progress=False)


class Tagger(L.LightningModule):
    """Convolution, attention and recurrent layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.lstm = nn.LSTM(8, 12, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(24, 8, batch_first=True)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.classifier(self.gru(self.lstm(self.encoder(x))[0])[0])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def test_masks_hold_in_training_and_are_kept_by_the_next(tmp_path):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(16, 5, 8, generator=generator), torch.randint(3, (16, 5), generator=generator))

    def fit(module, pruning, resume=None):
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[pruning],
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

    module, pruning = Tagger(), WeightPruning(score="magnitude", sparsity=0.5, progress=False)
    fit(module, pruning)
    inner = {"encoder.self_attn.in_proj_weight", "gru.weight_hh_l0", "lstm.weight_ih_l0_reverse", "conv.weight"}
    assert pruning.masks.keys() > inner
    for name, mask in pruning.masks.items():
        assert torch.equal(module.get_parameter(name) != 0, mask), name
    inspection = inspect(tmp_path / "last.ckpt", progress=False)
    assert inspection.resurrected == 0
    assert inspection.totals().sparsity == pytest.approx(0.5, abs=0.01)

    other, keeping = Tagger(), WeightPruning(score="keep")
    other.load_state_dict(module.state_dict())
    fit(other, keeping)
    assert all(torch.equal(keeping.masks[name], mask) for name, mask in pruning.masks.items())
    assert all(torch.equal(other.get_parameter(name) != 0, mask) for name, mask in pruning.masks.items())
