"""Weights that are no Linear's: Conv1d, and the matrices inside of MultiheadAttention, LSTM, GRU and RNN."""

import warnings

import lightning as L
import naive
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import WeightPruning, inspect, measure_coverage, prune
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.layer_kinds import CONVOLUTION1D, INNER
from lightning_prune.pruning.statistics import ALL_STATISTICS
from lightning_prune.pruning.targets import find_targets, select_layers

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


class OwnAttention(nn.MultiheadAttention):
    """May compute anything."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("name", ["lstm", "gru", "cell", "own attention"])
def test_scores_from_data_leave_inner_weights_out_and_say_so(name):
    inner = OwnAttention(8, 2) if name == "own attention" else INNER_MODELS[name]()
    model = nn.ModuleDict({"inner": inner, "proj": nn.Linear(8, 8)})
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


class WithLinears(nn.Module):
    """What MultiheadAttention computes, with a Linear for every matrix and attention written from the formula."""

    def __init__(self, attention):
        super().__init__()
        size, heads = attention.embed_dim, attention.num_heads
        packed = attention.in_proj_weight is not None
        weights = attention.in_proj_weight.chunk(3) if packed else [
            attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        ]  # fmt: skip
        self.heads, self.names = heads, [f"in_proj_weight.{x}" for x in "qkv"] if packed else [
            "q_proj_weight", "k_proj_weight", "v_proj_weight"
        ]  # fmt: skip
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], size).double() for w in (*weights, attention.out_proj.weight))
        biases = (*attention.in_proj_bias.chunk(3), attention.out_proj.bias)
        with torch.no_grad():
            for layer, weight, bias in zip(self.layers, (*weights, attention.out_proj.weight), biases, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)

    def forward(self, query, key, value, padding):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in zip(self.layers, (query, key, value), strict=False)
        )
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        mixed = scores.masked_fill(padding[:, None, None], float("-inf")).softmax(-1) @ v
        return self.layers[3](mixed.transpose(1, 2).flatten(2))


def attention_and_data(name):
    torch.manual_seed(0)
    kinds = {"self": {}, "cross": {}, "widths": {"kdim": 4, "vdim": 12}}
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **kinds[name]).double()
    nn.init.normal_(attention.in_proj_bias)
    query, padding = torch.randn(4, 5, 8).double(), torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    if name == "self":
        return attention, (query, query, query, padding)
    key = torch.randn(4, 5, kinds[name].get("kdim", 8)).double()
    value = torch.randn(4, 5, 12).double() if name == "widths" else key
    return attention, (query, key, value, padding)


def attention_loss(model, batch):
    query, key, value, padding = batch
    made = model(query, key, value, padding)
    made = made[0] if isinstance(made, tuple) else made
    return (made - 1).square().flatten(1).mean(1)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["self", "cross", "widths"])
def test_statistics_of_attention_are_those_of_linears(name, batch_size):
    attention, data = attention_and_data(name)
    reference = WithLinears(attention)
    batches = [tuple(x[i : i + batch_size] for x in data) for i in range(0, 4, batch_size)]
    if name == "self":
        batches = [(q, q, q, padding) for q, _, _, padding in batches]
    how = {"statistics": ALL_STATISTICS, "loss_fn": attention_loss, "num_samples": 4, "progress": False}
    chosen = select_layers(attention, called=True)
    assert not chosen.left_out
    assert [t.name for t in chosen.targets] == [*reference.names, "out_proj.weight"]
    found = collect(attention, batches, chosen.targets, **how)
    expected = collect(reference, batches, find_targets(reference), **how)
    for target, index in zip(chosen.targets, range(4), strict=True):
        for key in ALL_STATISTICS:
            known = expected[f"layers.{index}.weight"].get(key)
            torch.testing.assert_close(found[target.name].get(key), known, rtol=1e-10, atol=1e-12)
    assert "forward" not in vars(attention)


@pytest.mark.parametrize("how", [{"score": "wanda"}, {"score": "gblm"}, {}, {"pattern": "2:4"}, {"score": "sparsegpt"},
                                 {"update": "exact"}, {"update": "alps"}, {"group": "global"}])  # fmt: skip
@pytest.mark.parametrize("name", ["self", "cross", "widths"])
def test_attention_is_pruned_as_linears_are(name, how):
    attention, data = attention_and_data(name)
    reference = WithLinears(attention)
    args = {"num_samples": 4, "loss_fn": attention_loss, "progress": False, **how}
    masks = prune(attention, [data], **args)
    prune(reference, [data], **args)
    theirs = {n: layer.weight for n, layer in zip([*reference.names, "out_proj.weight"], reference.layers, strict=True)}
    for parameter, mask in masks.items():
        own = attention.get_parameter(parameter)
        assert torch.equal(own != 0, mask)
        parts = {parameter: own} if parameter in theirs else {
            f"{parameter}.{x}": part for x, part in zip("qkv", own.chunk(3), strict=True)
        }  # fmt: skip
        for part_name, part in parts.items():
            torch.testing.assert_close(part, theirs[part_name], rtol=1e-8, atol=1e-10)


def test_an_encoder_that_runs_without_gradients_is_seen():
    # In such passes torch computes whole encoder layers in one call.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(4, 5, 8)
    target = {"targets": ["in_proj_weight"], "num_samples": 4, "progress": False}
    fast = torch.backends.mha.get_fastpath_enabled()
    masks = prune(model, [x], "wanda", loss_fn=lambda m, b: m(b).square().mean((1, 2)), **target)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    seen = x.flatten(0, 1)
    for index in range(2):
        name = f"layers.{index}.self_attn.in_proj_weight"
        norms = seen.square().sum(0).div(4).sqrt()
        scores = (layer.self_attn.in_proj_weight.detach().abs() * norms).numpy()
        if index == 0:  # the second layer sees what the first, dense one made
            assert (masks[name].numpy() == naive.row_mask(scores, scores.size // 2)).all()
        assert int(masks[name].sum()) == masks[name].numel() // 2


@pytest.mark.parametrize("name", ["in_proj_weight", "weight_hh_l0"])
def test_each_matrix_is_frozen_for_itself(name):
    model = nn.ModuleDict({"inner": nn.GRU(8, 8) if "hh" in name else nn.MultiheadAttention(8, 2)})
    model["inner"].get_parameter(name).requires_grad_(False)
    assert select_layers(model).left_out == {f"inner.{name}": "frozen"}


def test_computed_matrices_are_left_out_and_their_attention_runs():
    attention, data = attention_and_data("self")
    nn.utils.parametrizations.spectral_norm(attention, "in_proj_weight")
    expected = attention_loss(attention.eval(), data)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left out
        masks = prune(attention, [data], "wanda", num_samples=4, progress=False,
                      loss_fn=lambda m, b: losses.append(attention_loss(m, b)))  # fmt: skip
    assert list(masks) == ["out_proj.weight"]
    torch.testing.assert_close(losses[0], expected.detach())


def test_parameters_that_are_made_anew_are_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "proj": nn.Linear(8, 8)})
    adapted = get_peft_model(model, LoraConfig(target_modules=["attention"], r=2))
    for spare in range(30):  # memory, and with it ids, of what is gone is given again, to others each time
        taken = [nn.Parameter(torch.zeros(1)) for _ in range(spare % 7)]
        with pytest.raises(ValueError, match="another parameter each time it is looked at"):
            find_targets(adapted)
        del taken
    assert [t.name for t in find_targets(adapted, ignore=["attention.*"], frozen=True)] == [
        "base_model.model.proj.weight"
    ]


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


@pytest.mark.parametrize("score", ["magnitude", "kfac"])
def test_masks_hold_in_training_and_are_kept_by_the_next(tmp_path, score):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(16, 5, 8, generator=generator), torch.randint(3, (16, 5), generator=generator))

    class Describing(L.Callback):
        def on_train_end(self, trainer, module):
            assert trainer.callbacks[0].describe_masks()["masks"] == len(trainer.callbacks[0].masks) > 0

    def fit(module, pruning, resume=None):
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[pruning, Describing()],
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

    module, pruning = Tagger(), WeightPruning(score=score, sparsity=0.5, num_samples=8, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the recurrent weights are left out
        fit(module, pruning)
    inner = {"encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj.weight", "conv.weight"}
    recurrent = {"gru.weight_hh_l0", "lstm.weight_ih_l0_reverse"}
    assert pruning.masks.keys() > (inner | recurrent if score == "magnitude" else inner)
    assert pruning.masks.keys().isdisjoint(recurrent) or score == "magnitude"
    for name, mask in pruning.masks.items():
        assert torch.equal(module.get_parameter(name) != 0, mask), name
    inspection = inspect(tmp_path / "last.ckpt", progress=False)
    assert inspection.resurrected == 0
    assert inspection.totals().sparsity == pytest.approx(0.5, abs=0.01) or score == "kfac"

    other, keeping = Tagger(), WeightPruning(score="keep")
    other.load_state_dict(module.state_dict())
    fit(other, keeping)
    assert all(torch.equal(keeping.masks[name], mask) for name, mask in pruning.masks.items())
    assert all(torch.equal(other.get_parameter(name) != 0, mask) for name, mask in pruning.masks.items())
