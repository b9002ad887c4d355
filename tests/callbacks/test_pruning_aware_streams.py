"""Statistics streamed from training: kfac saliency and input moments, against float64 written out."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from pruning_aware_models import SMALL, count, fit, make_module, make_trainer
from tiny import make_llama, make_tokens
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import PruningAwarePretraining
from lightning_prune.pruning.padding import Padding
from lightning_prune.structure.compensation import StreamedMoments
from lightning_prune.structure.saliency import StreamedKFAC
from lightning_prune.structure.units import merge_removals, read_structure

ALL = ("attention", "ffn", "hidden")


def passes(model: Any, ids: Tensor, **more: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of every linear layer in one forward and backward."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = []

            def hook(_: Any, args: Any, output: Tensor, name: str = name) -> None:
                found[name].append(args[0].detach().flatten(0, -2).double())
                output.retain_grad()
                found[name].append(output)

            handles.append(module.register_forward_hook(hook))
    model(ids, **{"labels": ids, **more}).loss.backward()
    for handle in handles:
        handle.remove()
    return {name: (x, output.grad.flatten(0, -2).double()) for name, (x, output) in found.items()}


def test_kfac_of_two_steps_is_the_formula() -> None:
    model = make_llama(tie_word_embeddings=True)
    structure = read_structure(model)
    stream = StreamedKFAC(structure, ALL)
    stream.stream.watch()
    expected = {"ffn": torch.zeros(2, 96).double(), "hidden": torch.zeros(1, 64).double()}
    for step in range(2):
        ids = make_tokens(3, 6, seed=step)
        stream.stream.listening = True
        (model(ids, labels=ids).loss * (1, 8)[step]).backward()
        stream.stream.listening = False
        stream.add((1, 8)[step])
        for name, (x, delta) in passes(model, ids).items():
            weight = model.get_submodule(name).weight.detach().double()
            score = torch.zeros(weight.shape[1]).double()
            for i in range(weight.shape[0]):
                score += weight[i] ** 2 * delta[:, i].square().sum() * x.square().sum(0)
            if name.endswith("down_proj"):
                expected["ffn"][int(name.split(".")[2])] += score
            elif not name.endswith("o_proj"):
                expected["hidden"][0] += score
    assert stream.steps == 2
    for unit_type, sums in expected.items():
        torch.testing.assert_close(stream.sums(unit_type), sums, rtol=1e-4, atol=0)


def test_moments_weigh_steps_by_their_age_and_leave_padding_out() -> None:
    model = make_llama()
    structure = read_structure(model)
    stream = StreamedMoments(structure, ALL, decay=0.75)
    stream.stream.watch()
    products = []
    for step in range(3):
        ids = make_tokens(2, 6, seed=step)
        real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        stream.stream.padding = Padding(real)
        stream.stream.listening = True
        model(ids)
        model(ids)  # two batches of one optimizer step
        stream.stream.listening = False
        model(ids)
        stream.end_step()
        x = passes(model, ids)["model.layers.1.mlp.down_proj"][0][real.flatten()]
        products.append(x.t() @ x / len(x))
    ages = [0.75**2, 0.75, 1.0]
    expected = sum(a * p for a, p in zip(ages, products, strict=True)) / sum(ages)
    torch.testing.assert_close(stream.hessians["model.layers.1.mlp.down_proj"].double(), expected, rtol=1e-4, atol=1e-7)
    assert stream.ready
    by_layer = stream.by_layer()
    assert by_layer["model.layers.0.self_attn.q_proj"] is by_layer["model.layers.0.self_attn.v_proj"]
    assert "lm_head" in by_layer

    removal = merge_removals(
        structure,
        {
            "ffn": [
                torch.tensor([3]),
                torch.tensor(
                    [
                        5,
                    ]
                ),
            ]
        },
    )
    stream.mask(structure, removal)
    assert not stream.hessians["model.layers.1.mlp.down_proj"][5].any()
    assert not stream.hessians["model.layers.1.mlp.down_proj"][:, 5].any()
    assert stream.hessians["model.layers.0.mlp.down_proj"][5].any()


@pytest.mark.slow
def test_kfac_of_variant_b_is_the_loss_increase_after_the_update() -> None:
    """By least squares in float64, one unit after the other; a channel that another one repeats costs nothing."""
    model = make_llama()
    down = model.get_submodule("model.layers.1.mlp.down_proj").weight
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            weight = model.get_submodule(f"model.layers.1.mlp.{name}").weight
            weight[7] = weight[20]
        down[:, 7] *= 100  # so that it is the most salient channel before the update
    structure = read_structure(model)
    moments = StreamedMoments(structure, ALL, decay=0.5)
    stream, plain = StreamedKFAC(structure, ALL, unexplained=moments.unexplained), StreamedKFAC(structure, ALL)
    ids = make_tokens(16, 12)
    for observer in (moments.stream, stream.stream, plain.stream):
        observer.watch()
        observer.listening = True
    model(ids, labels=ids).loss.backward()
    for observer in (moments.stream, stream.stream, plain.stream):
        observer.listening = False
    moments.end_step()
    stream.add()
    plain.add()

    heads = structure.sizes.num_attention_heads // structure.sizes.num_key_value_heads * structure.sizes.head_dim
    expected = {t: torch.zeros_like(stream.sums(t)) for t in ALL}
    for name, (x, delta) in passes(model, ids).items():
        weight = model.get_submodule(name).weight.detach().double()
        layer = int(name.split(".")[2]) if "layers" in name else 0
        kind = {"o_proj": "attention", "down_proj": "ffn"}.get(name.split(".")[-1], "hidden")
        size = heads if kind == "attention" else 1
        ridge = 0.01 * x.square().sum() / x.shape[1]
        for unit in range(x.shape[1] // size):
            lost = torch.arange(unit * size, (unit + 1) * size)
            kept = torch.tensor([i for i in range(x.shape[1]) if i not in lost])
            # Outputs weigh with the squares of their gradients.
            wanted = x[:, lost] @ weight[:, lost].t() * delta.square().sum(0).sqrt()
            design = torch.cat([x[:, kept], ridge.sqrt() * torch.eye(len(kept)).double()])
            wanted = torch.cat([wanted, torch.zeros(len(kept), wanted.shape[1]).double()])
            residual = wanted - design @ torch.linalg.lstsq(design, wanted, driver="gelsd").solution
            expected[kind][layer if kind != "hidden" else 0, unit] += residual.square().sum()
    for unit_type in ALL:
        torch.testing.assert_close(stream.sums(unit_type), expected[unit_type], rtol=1e-3, atol=0)
    assert bool((stream.sums("ffn") <= plain.sums("ffn")).all())
    assert plain.sums("ffn")[1].argmax() == 7
    assert stream.sums("ffn")[1, 7] < 0.1 * plain.sums("ffn")[1, 7]


class OwnMask(L.LightningModule):
    """Batches that do not name their padding; a loss of None for a batch whose first token is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_llama().double()

    def training_step(self, batch: Any, index: int) -> Any:
        ids, lengths = batch
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        loss = self.model(input_ids=ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100)).loss
        return loss if ids[0, 0] else None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Observed(PruningAwarePretraining):
    """Looks at what the one step has given, before anything is done with it."""

    def on_train_batch_end(self, *args: Any) -> None:
        moments = self._now.moments
        assert moments is not None
        self.tokens_seen = dict(moments.stream.tokens)
        moments.end_step()
        self.hessians, self.sums = moments.hessians, self._now.saliency.sums("ffn")
        super().on_train_batch_end(*args)
        self.listening = any(stream.listening for stream in self._now.streams)


def test_padding_is_read_from_what_the_model_is_called_with() -> None:
    """Against the samples without padding, one by one."""
    ids, lengths = make_tokens(2, 8).clamp(min=1), torch.tensor([8, 5])
    module = OwnMask()
    callback = Observed(0.9, ("ffn",), 100, saliency="kfac", second_order=True, second_order_every=1)
    make_trainer(callback, max_steps=1).fit(module, DataLoader(TensorDataset(ids, lengths), batch_size=2))
    alone = [passes(module.model, row[None, :n]) for row, n in zip(ids, lengths.tolist(), strict=True)]
    real = torch.arange(8) < lengths[:, None]
    whole = passes(module.model, ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj"
        x = torch.cat([found[name][0] for found in alone])
        torch.testing.assert_close(callback.hessians[name], x.t() @ x / 13)
        norms = whole[name][1].square().sum(0)  # [O]; no loss depends on padding
        weight = module.model.get_submodule(name).weight.detach()
        torch.testing.assert_close(callback.sums[layer], (norms @ weight.square()) * x.square().sum(0))
    assert set(callback.tokens_seen.values()) == {13}


def test_a_batch_without_a_loss_leaves_nothing_listening() -> None:
    ids, lengths = make_tokens(2, 8) * 0, torch.tensor([8, 5])
    callback = Observed(0.9, ("ffn",), 100, saliency="kfac", second_order=True, second_order_every=1)
    loader = DataLoader(TensorDataset(ids, lengths), batch_size=2)
    make_trainer(callback, max_steps=1, max_epochs=1).fit(OwnMask(), loader)
    assert set(callback.tokens_seen.values()) == {13}
    assert not callback.listening  # validation may come next


def hooks(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("settings", [{}, {"second_order": True}], ids=["variant A", "variant B"])
def test_kfac_shrinks_a_model(settings: dict[str, Any]) -> None:
    module = make_module(gradient_checkpointing=True)
    before = hooks(module)
    callback = PruningAwarePretraining(0.6, ALL, saliency="kfac", end=6, compact_every=2, **settings)
    fit(callback, module, max_steps=7)
    assert count(module.model) == callback.history[-1].parameters <= 0.6 * count(make_module().model)
    assert hooks(module) == before


def test_gradient_checkpointing_counts_a_pass_once() -> None:
    histories = []
    for checkpointing in (False, True):
        callback = PruningAwarePretraining(0.8, ALL, saliency="kfac", second_order=True, end=4)
        fit(callback, make_module(gradient_checkpointing=checkpointing), max_steps=5)
        histories.append(callback.history)
    for one, other in zip(*histories, strict=True):
        assert one.units == other.units
        for unit_type, value in one.saliency.items():
            assert other.saliency[unit_type] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("saliency", ["taylor1", "kfac"])
def test_masked_query_heads_are_as_if_sliced_off(saliency: str) -> None:
    """One alone averages the values of its group, which no moment may count, nor any column come back for."""
    config = {**SMALL, "model_type": "mistral", "num_attention_heads": 8, "head_dim": 4, "sliding_window": None}
    histories, losses = [], []
    for compact_every in (1, 100):
        callback = PruningAwarePretraining(
            {"num_attention_heads": 2}, ("attention",), every_n_steps=3, saliency=saliency, attention_unit="head",
            second_order=True, second_order_every=1, compact_every=compact_every,
        )  # fmt: skip
        seen: list[float] = []

        class Losses(L.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
                seen.append(float(outputs["loss"]))  # noqa: B023

        fit(callback, make_module(config=config), Losses(), max_steps=11)
        histories.append([record.saliency for record in callback.history[1:]])
        losses.append(seen)
    assert len(histories[0]) == 3
    for one, other in zip(*histories, strict=True):
        assert other["attention"] == pytest.approx(one["attention"], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_gradients_that_are_not_recorded_are_refused() -> None:
    """A re-entrant checkpoint runs its layers under no_grad: all saliencies were zero."""
    module = make_module()
    module.model.gradient_checkpointing_enable({"use_reentrant": True})
    before = hooks(module)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.down_proj' \(2 layers.*'use_reentrant': False"):
        fit(callback := PruningAwarePretraining(0.9, ("ffn",), saliency="kfac", end=2), module, max_steps=3)
    assert len(callback.history) == 1
    assert hooks(module) == before
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    fit(PruningAwarePretraining(0.9, ("ffn",), saliency="kfac", end=2), module, max_steps=3)
    assert module.model.config.intermediate_size < 48


@pytest.mark.slow
def test_the_second_order_update_lowers_the_loss_right_after_a_pruning() -> None:
    """What variant B is for: the same units go, the loss rises less."""
    losses = {}
    for second_order in (False, True):
        module = make_module(learning_rate=3e-3)
        fit(PruningAwarePretraining(0.99, ("ffn",), start=10**6), module, max_steps=40)  # trained, nothing pruned

        class Measure(PruningAwarePretraining):
            def _prune(self, trainer: Any, step: int) -> None:
                super()._prune(trainer, step)
                ids = make_tokens(64, 8, vocab=64).repeat(1, 2)
                with torch.no_grad():
                    self.after = float(trainer.lightning_module.model(ids, labels=ids).loss)

        # Half the channels at once, so that there is much to make up for.
        callback = Measure(
            {"intermediate_size": 24}, ("ffn",), saliency="magnitude", end=4, every_n_steps=4,
            second_order=second_order, second_order_every=1,
        )  # fmt: skip
        module.hparams["learning_rate"] = 1e-6
        fit(callback, module, max_steps=4)
        losses[second_order] = callback.after
    assert losses[True] < losses[False]
