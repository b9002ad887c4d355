"""Masks that hold in any loop: gradients before they are clipped, weights after steps, states, resume, two ranks."""

from __future__ import annotations

import copy
import gc
import io
import math
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forking import on_ranks
from tiny import make_llama, make_tokens
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from lightning_prune import hold_masks, prune
from lightning_prune.pruning.holding import MaskHold
from lightning_prune.sharding import gather_whole


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6))


def make_masks(model: nn.Module, share: float = 0.5, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrices = [(n, p.shape) for n, p in model.named_parameters() if len(p.shape) > 1]
    return {name: torch.rand(shape, generator=generator) >= share for name, shape in matrices}


def inputs(steps: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(steps, 4, 6, generator=torch.Generator().manual_seed(seed))


def assert_held(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    for name, mask in masks.items():
        weight = gather_whole(model.get_parameter(name).detach())
        assert bool((weight[~mask] == 0).all()), name
        assert bool((weight[mask] != 0).any()), name


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor, scale: float = 1) -> list[float]:
    """Clipping norms of a loop with two backward passes a step."""
    norms = []
    for x in data:
        for part in x.chunk(2):
            (scale * model(part).square().sum()).backward()
        norms.append(float(gather_whole(clip_grad_norm_(model.parameters(), 0.01))))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def naive_training(masks, data, clip=0.01, lr=0.05, decay=0.1):
    """AdamW in float64 on the kept weights alone: those pruned are no parameters at all."""
    model = make_model().double()
    free, places = [], []
    for name, parameter in model.named_parameters():
        kept = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        free.append(parameter.detach()[kept].clone().requires_grad_())
        places.append((name, kept))
    optimizer, norms = torch.optim.AdamW(free, lr=lr, weight_decay=decay), []

    def whole():
        pairs = zip(places, free, strict=True)
        return {n: torch.zeros(k.shape, dtype=torch.float64).masked_scatter(k, f) for (n, k), f in pairs}

    for x in data.double():
        torch.func.functional_call(model, whole(), x).square().sum().backward()
        norms.append(math.sqrt(sum(float(f.grad.square().sum()) for f in free)))
        for f in free:
            f.grad *= min(1.0, clip / (norms[-1] + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in whole().items()}, norms


def test_survivors_train_as_if_the_pruned_were_no_parameters():
    model, data = make_model(), inputs(5)
    masks = make_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    with hold_masks(model, masks, optimizer):
        norms = train(model, optimizer, data)
    expected, expected_norms = naive_training(masks, data)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-4, atol=1e-5)
    assert_held(model, masks)


@pytest.mark.parametrize("wrap", ["compiled", "checkpointed", "autocast", "lbfgs", "two optimizers"])
def test_other_ways_to_train(wrap):
    model = make_model()
    masks = make_masks(model)
    if wrap == "lbfgs":
        optimizers = [torch.optim.LBFGS(model.parameters(), max_iter=3)]
    elif wrap == "two optimizers":
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in (model[0], model[2])]
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05)]
    hold = hold_masks(model, masks, optimizers)
    run = torch.compile(model, backend="aot_eager") if wrap == "compiled" else model
    alive: list[int] = []
    for x in inputs(3):

        def loss(x=x):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=wrap == "autocast"):
                value = checkpoint(model, x, use_reentrant=False) if wrap == "checkpointed" else run(x)
            total = value.float().square().sum()
            total.backward()
            alive.append(sum(int((model.get_parameter(n).grad[~mask] != 0).sum()) for n, mask in masks.items()))
            return total

        for optimizer in optimizers:
            if wrap == "lbfgs":
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
    assert_held(model, masks)
    assert not any(alive)
    hold.remove()
    loss()
    assert alive[-1]


class Lookahead(torch.optim.Optimizer):
    """Pulls weights towards slow copies of them, which it has made while the model was dense."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer
        self.slow = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        for p, slow in zip(self.optimizer.param_groups[0]["params"], self.slow, strict=True):
            p.copy_(slow.lerp_(p, 0.5))


class SAM(torch.optim.Optimizer):
    """Has no step of its own: a loop calls the second alone, which steps another."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer = optimizer
        self.second_step = optimizer.step


@pytest.mark.parametrize("kind", [Lookahead, SAM])
def test_optimizers_that_step_another(kind):
    model = make_model()
    masks, fewer = make_masks(model), make_masks(model, 0.8)
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    hold = hold_masks(model, masks, optimizer)
    for step, x in enumerate(inputs(4)):
        if step == 2:
            masks = {name: mask & fewer[name] for name, mask in masks.items()}
            hold.update(masks)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        getattr(optimizer, "second_step", optimizer.step)()
        assert_held(model, masks)
    hold.remove()
    inner = optimizer.base_optimizer if kind is SAM else optimizer.optimizer
    assert not any(o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in (optimizer, inner))


def test_gradients_by_hand_and_weights_changed_beside_the_optimizer():
    model = make_model()
    masks = make_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold = hold_masks(model, masks, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    hold.mask_gradients()
    assert (model[0].weight.grad == masks["0.weight"]).all()
    model[0].weight.grad.fill_(1)
    optimizer.step()
    assert (optimizer.state[model[0].weight]["momentum_buffer"] == masks["0.weight"]).all()
    assert hold.mask_weights() == {}
    with torch.no_grad():
        model[2].weight.add_(1)
    assert hold.mask_weights() == {"2.weight": int((~masks["2.weight"]).sum())}
    assert_held(model, masks)


def test_other_masks_clear_states():
    model = make_model()
    first, second = make_masks(model), make_masks(model, 0.8, seed=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    hold = hold_masks(model, first, optimizer)
    train(model, optimizer, inputs(2))
    hold.update(second)
    assert_held(model, second)
    for name, mask in second.items():
        state = optimizer.state[model.get_parameter(name)]
        assert (state["exp_avg"][~mask] == 0).all()
        assert (state["exp_avg"][mask & first[name]] != 0).any()
        assert torch.equal(hold.masks[name], mask)
    hold.update({"0.weight": second["0.weight"]})
    train(model, optimizer, inputs(2))
    assert (model[2].weight[~second["2.weight"]] != 0).any()


def test_resumed_training_is_the_uninterrupted_one():
    data = inputs(6)

    def start():
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return model, optimizer

    model, optimizer = start()
    masks = make_masks(model)
    hold = hold_masks(model, masks, optimizer)
    train(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "hold": hold.state_dict()}, file)
    train(model, optimizer, data[3:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, optimizer = start()
    hold = hold_masks(other, make_masks(other, 0.1, seed=8), optimizer)
    other.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    hold.load_state_dict(saved["hold"])
    assert all(torch.equal(hold.masks[name], mask) for name, mask in masks.items())
    train(other, optimizer, data[3:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05)])
def test_states_that_torch_makes_by_a_step_are_loaded(rate):
    """Its checkpoints step an optimizer without states, between the weights of a checkpoint and its masks."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    hold = hold_masks(model, make_masks(model), optimizer)
    train(model, optimizer, inputs(3))
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer), hold.state_dict()))
    other = make_model(seed=4)
    fresh = torch.optim.AdamW(other.parameters(), lr=rate)
    again = hold_masks(other, make_masks(other, seed=8), fresh)
    other.load_state_dict(saved[0])
    set_optimizer_state_dict(other, fresh, saved[1])
    again.load_state_dict(saved[2])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for one, two in ((model, optimizer), (other, fresh)):
        train(one, two, inputs(2, seed=6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_bad_states_change_nothing():
    model = make_model()
    masks = make_masks(model)
    hold = hold_masks(model, masks, torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    good = hold.state_dict()
    damaged = copy.deepcopy(good)
    damaged["masks"]["0.weight"]["bits"][0] ^= 1
    foreign = MaskHold(nn.Linear(3, 3), {"weight": torch.eye(3).bool()}).state_dict()
    for state, message in [
        ({}, "version None"),
        ({**good, "version": 7}, "version 7"),
        ({**good, "masks": {}}, "rank 0 alone"),
        (damaged, r"'0\.weight' is damaged"),
        (foreign, "no such parameter"),
    ]:
        with pytest.raises(ValueError, match=message):
            hold.load_state_dict(state)
        assert all(torch.equal(hold.masks[name], mask) for name, mask in masks.items())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_hold_is_refused_before_anything_changes():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    masks, optimizer = make_masks(model), torch.optim.SGD(model.parameters(), lr=0.1)
    half = torch.optim.SGD(model[0].parameters(), lr=0.1)
    for arguments, error, message in [
        ((model, masks, half), ValueError, r"by no optimizer given, first '2\.weight'"),
        ((model, {}, optimizer), ValueError, "masks is empty"),
        ((model, {"9.weight": masks["0.weight"]}, optimizer), ValueError, "no such parameter"),
        ((model, {"0.weight": masks["2.weight"]}, optimizer), ValueError, "has shape"),
        ((model, {"0.weight": masks["0.weight"].float()}, optimizer), ValueError, r"torch\.bool"),
        ((model, masks, model), TypeError, r"pass a torch\.optim\.Optimizer"),
        ((model, masks, [optimizer, None]), TypeError, "NoneType"),
    ]:
        with pytest.raises(error, match=message):
            hold_masks(*arguments)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not optimizer._optimizer_step_pre_hooks
    model[2].weight.requires_grad_(False)
    hold_masks(model, masks, half)


def test_replaced_moved_and_newly_trained_parameters_are_followed():
    model = make_model()
    masks = make_masks(model)
    model[2].weight.requires_grad_(False)
    hold = hold_masks(model, masks, torch.optim.SGD(model[0].parameters(), lr=0.1))
    model[0].weight = nn.Parameter(torch.ones(10, 6))
    model[2].weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    hold.watch([optimizer])
    with pytest.warns(UserWarning, match=r"1 pruned parameters \(0\.weight"):
        train(model, optimizer, inputs(1))
    assert_held(model, masks)
    model(inputs(1)[0]).sum().backward()
    assert (model[2].weight.grad[~masks["2.weight"]] == 0).all()
    hold.follow()
    del model[0].weight
    model[0].weight = nn.Parameter(torch.ones(10, 7))
    with pytest.raises(RuntimeError, match=r"'0\.weight' was replaced during training"):
        hold.follow()


def test_a_model_that_shrinks_while_its_masks_are_held_says_so_in_the_backward_pass():
    model = make_model()
    hold = hold_masks(model, make_masks(model), torch.optim.AdamW(model.parameters()))
    model[0].weight.data, model[0].bias.data = model[0].weight[:5].detach(), model[0].bias[:5].detach()
    model[2].weight.data = model[2].weight[:, :5].detach()
    with pytest.raises(RuntimeError, match=r"'0\.weight'.*\(10, 6\), the parameter \(5, 6\).*MaskHold\.remove"):
        model(inputs(1)[0]).sum().backward()
    hold.remove()
    model(inputs(1)[0]).sum().backward()


def test_following_a_layer_costs_the_same_however_many_lie_beside_it():
    def calls_a_layer(layers: int) -> float:
        model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(layers)))
        hold, calls = MaskHold(model, make_masks(model)), []
        sys.setprofile(lambda _, event, __: calls.append(event) if event == "call" else None)
        try:
            hold.follow()
        finally:
            sys.setprofile(None)
        return len(calls) / layers

    assert calls_a_layer(80) < 1.1 * calls_a_layer(20)


def test_ties_that_are_torn_are_an_error():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight = model[0].weight
    masks = {"0.weight": torch.rand(4, 4) < 0.5}
    hold = hold_masks(model, masks, torch.optim.SGD(model.parameters(), lr=0.1))
    model[1].weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(RuntimeError, match="have parameters of their own now"):
        hold.follow()


def test_a_copy_of_the_model_is_free():
    model = make_model()
    masks = make_masks(model)
    hold_masks(model, masks, torch.optim.SGD(model.parameters(), lr=0.1))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(inputs(1)[0]).square().sum().backward()
        assert (other[0].weight.grad[~masks["0.weight"]] != 0).any()


def test_a_copy_of_a_hold_has_its_masks():
    model = make_model()
    masks = make_masks(model)
    model.hold = hold_masks(model, masks, torch.optim.SGD(model.parameters(), lr=0.1))
    model(inputs(1)[0]).square().sum().backward()  # a gradient is known then
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.hold.masks == masks
        other.hold.mask_gradients()
        assert not other.hold.mask_weights()


def test_masks_of_prune_hold_in_a_transformers_model():
    model = make_llama()
    batches = [{"input_ids": make_tokens(2, 12, seed=s)} for s in range(3)]
    masks = prune(model, batches, score="magnitude", sparsity=0.6, progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with hold_masks(model, masks, optimizer):
        for batch in batches:
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_held(model, masks)


# -- several ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fills"),
    [("LoraConfig", True), ("LoHaConfig", True), ("HiraConfig", False), ("IA3Config", False), (None, False)],
)
def test_adapters_that_a_merge_fills_zeros_with_are_named(kind, fills):
    import peft

    from lightning_prune.perp import add_adapters

    if kind is not None and not hasattr(peft, kind):
        pytest.skip(f"this version of PEFT has no {kind}")
    model = make_llama()
    masks = prune(model, [{"input_ids": make_tokens(4, 8, vocab=64)}], score="magnitude", sparsity=0.5, progress=False)
    options = {} if kind == "IA3Config" else {"r": 2}
    more = {"feedforward_modules": []} if kind == "IA3Config" else {}
    if kind is None:
        adapted = add_adapters(model, r=2)
    else:
        adapted = peft.get_peft_model(model, getattr(peft, kind)(target_modules=["q_proj"], **options, **more))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hold_masks(adapted, masks, optimizer).remove()
    told = [str(warning.message) for warning in caught if "merge_and_unload" in str(warning.message)]
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "layernorm" not in name:
            nn.init.normal_(parameter.data)
    weights = dict(adapted.merge_and_unload().named_parameters())
    filled = [name for name, mask in masks.items() if weights[name][~mask].count_nonzero()]
    assert bool(filled) == bool(told) == fills
    assert all(f"{len(filled)} layers with pruned weights" in text and "q_proj'" in text for text in told)


def _shard(model, ranks, way):
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ranks",))
    if way == "tensor":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return
    settings = {"reshard_after_forward": False} if way == "gathered" else {}
    if way == "bf16":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if way == "offload":
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for part in (model[0], model):
        fully_shard(part, mesh=mesh, **settings)


def _on_each_rank(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    results = {}
    for way in ("ddp", "ddp view", "fsdp2", "gathered", "bf16", "offload", "tensor"):
        model = make_model()
        masks = make_masks(model)
        if way.startswith("ddp"):
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=way == "ddp view")
        else:
            _shard(model, ranks, way)
            wrapped = model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        hold = hold_masks(wrapped, masks, optimizer)
        data = inputs(5)
        # Every rank has its share of each batch; DDP and FSDP2 take the mean of gradients over ranks, not the sum.
        own, scale = (data, 1) if way == "tensor" else (data.chunk(ranks, 1)[rank], ranks)
        norms = train(wrapped, optimizer, own[:3], scale)
        saved = [hold.state_dict()]
        assert bool(saved[0]["masks"]) == (rank == 0 or way.startswith("ddp"))
        if rank and not way.startswith("ddp"):
            with pytest.raises(ValueError, match="rank 0 alone"):
                hold.load_state_dict(saved[0])
        dist.broadcast_object_list(saved, 0)
        hold.update(make_masks(model, 0.0))
        hold.load_state_dict(saved[0])
        norms += train(wrapped, optimizer, own[3:], scale)
        assert isinstance(model[0].weight, DTensor) != way.startswith("ddp")
        results[way] = (norms, {name: gather_whole(p.detach()) for name, p in model.named_parameters()})
        hold.remove()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_train_as_one(tmp_path: Path):
    on_ranks(2, _on_each_rank, 2, str(tmp_path))
    masks = make_masks(make_model())
    expected, expected_norms = naive_training(masks, inputs(5))
    for rank in range(2):
        for way, (norms, weights) in torch.load(tmp_path / f"rank{rank}.pt", weights_only=True).items():
            rough = way == "bf16"
            assert norms == pytest.approx(expected_norms, rel=0.05 if rough else 1e-4), way
            for name, weight in weights.items():
                tolerance = {"rtol": 0.1, "atol": 0.05} if rough else {"rtol": 1e-4, "atol": 1e-5}
                torch.testing.assert_close(weight.double(), expected[name], **tolerance)
                if name in masks:
                    assert bool((weight[~masks[name]] == 0).all()), (way, name)


def test_a_hold_that_nobody_keeps_goes_with_its_optimizer():
    model = make_model()
    masks = make_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold_masks(model, masks, optimizer)
    train(model, optimizer, inputs(1))
    assert_held(model, masks)
    del optimizer
    gc.collect()
    model(inputs(1)[0]).square().sum().backward()
    assert all((model.get_parameter(name).grad[~mask] != 0).any() for name, mask in masks.items())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights_are_held_as_by_hand(dtype):
    torch.manual_seed(0)
    model = nn.Linear(5, 4, dtype=dtype)
    masks = [torch.rand(4, 5) < share for share in (0.7, 0.4)]
    masks[1] &= masks[0]
    weight, bias = (p.detach().clone().to(torch.complex128) for p in model.parameters())
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    hold = hold_masks(model, {"weight": masks[0]}, optimizer)
    for step in range(4):
        mask = masks[step // 2]
        if step == 2:
            hold.update({"weight": mask})
        x = torch.randn(3, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x.to(dtype)).abs().square().sum().backward()
        optimizer.step()
        weight *= mask
        momentum[0] *= mask
        own = [value.clone().requires_grad_() for value in (weight, bias)]
        gradients = torch.autograd.grad((x @ own[0].T + own[1]).abs().square().sum(), own)
        momentum = [0.9 * m + g for m, g in zip(momentum, (gradients[0] * mask, gradients[1]), strict=True)]
        weight, bias = weight - 0.01 * momentum[0], bias - 0.01 * momentum[1]
        torch.testing.assert_close(model.weight.detach().to(torch.complex128), weight, rtol=1e-4, atol=1e-5)
        assert (model.weight[~mask] == 0).all()
        assert (optimizer.state[model.weight]["momentum_buffer"][~mask] == 0).all()
