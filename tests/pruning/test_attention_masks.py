"""Padding read from attention masks of every shape, and the one rule of which tokens are predicted."""

import copy

import naive
import pytest
import torch
from tiny import LAYERS, TINY, make_llama, make_tokens

from lightning_prune import prune
from lightning_prune.evaluation.perplexity import perplexity
from lightning_prune.pruning.attention_masks import real_positions
from lightning_prune.pruning.batches import padding_mask
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.running import causal_lm_loss, causal_lm_losses, next_token_labels
from lightning_prune.pruning.targets import find_targets
from lightning_prune.text.module import CausalLM

LENGTHS = [8, 5, 1, 6]


def flat(side, lengths=LENGTHS, width=8):
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, n in enumerate(lengths):
        mask[i, slice(0, n) if side == "right" else slice(width - n, width)] = True
    return mask


def square(real, causal=True, own=False):
    """Who may attend to whom, ``[B, 1, T, T]``; with `own` every position attends to itself."""
    width = real.shape[1]
    allowed = real[:, None, None, :].expand(-1, 1, width, width).clone()
    if causal:
        allowed &= torch.ones(width, width, dtype=torch.bool).tril()
    return allowed | torch.eye(width, dtype=torch.bool) if own else allowed


LOW = torch.finfo(torch.float32).min


def additive(allowed, low=LOW):
    return torch.zeros(allowed.shape).masked_fill(~allowed, low)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_padding_of_a_square_mask(side, causal, own):
    real = flat(side)
    allowed = square(real, causal, own)
    shape = real.shape
    forms = [allowed, allowed.long(), allowed[:, 0], allowed.expand(-1, 3, -1, -1), additive(allowed)]
    forms += [additive(allowed, -torch.inf), additive(allowed, -1e4).half(), {"full_attention": allowed}]
    for form in forms:
        assert torch.equal(real_positions(form, shape), real)
        ids = torch.zeros(shape, dtype=torch.long)
        assert torch.equal(padding_mask({"input_ids": ids, "attention_mask": form}), real)


def test_rows_without_a_key_that_are_opened_to_all():
    """Some attention kernels cannot take a query without keys: those rows get all of them."""
    real = flat("left")
    allowed = square(real)
    allowed |= ~allowed.any(-1, keepdim=True)
    assert torch.equal(real_positions(allowed, real.shape), real)


def test_square_masks_without_padding():
    ids = torch.zeros(2, 6, dtype=torch.long)
    whole = torch.ones(2, 6, dtype=torch.bool)
    window = torch.ones(6, 6, dtype=torch.bool).tril() & torch.ones(6, 6, dtype=torch.bool).triu(-2)
    texts = torch.tensor([0, 0, 0, 1, 1, 2])
    packed = (texts[:, None] == texts[None]) & torch.ones(6, 6, dtype=torch.bool).tril()
    for allowed in (square(whole), square(whole, causal=False), window[None, None], window):
        assert padding_mask({"input_ids": ids, "attention_mask": allowed}) is None
    # A packed row: the ends of its texts are no padding; a text of one token at the very end cannot be told from it.
    found = padding_mask({"input_ids": ids, "attention_mask": packed[None, None]})
    assert found.tolist() == [[True] * 5 + [False]] * 2
    assert padding_mask({"input_ids": ids[:, :5], "attention_mask": packed[None, None, :5, :5]}) is None
    assert padding_mask({"input_ids": ids, "attention_mask": None}) is None
    assert padding_mask({"input_ids": ids, "attention_mask": {"full_attention": None}}) is None


def test_masks_by_other_names():
    ids, real = torch.zeros(4, 8, dtype=torch.long), flat("right")
    for name, mask in (
        ("src_key_padding_mask", ~real),
        ("padding_mask", ~real),
        ("padding_mask", real.long()),
        ("key_padding_mask", torch.zeros(real.shape).masked_fill(~real, -torch.inf)),
    ):
        assert torch.equal(padding_mask({"input_ids": ids, name: mask}), real), name
    for name in ("decoder_padding_mask", "tgt_key_padding_mask"):
        assert padding_mask({"input_ids": ids, name: ~real}) is None
    with pytest.raises(ValueError, match="read as True = padding, which leaves a sample without a token"):
        padding_mask({"input_ids": ids, "padding_mask": real})
    packed = {"input_ids": torch.zeros(1, 10, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 3, 8])}
    assert padding_mask(packed).tolist() == [[True] * 8 + [False] * 2]


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 4, 8), torch.ones(3), "flash", torch.ones(1, 1, 1, 2, 2)])
def test_masks_that_do_not_tell_are_refused(mask):
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": mask}
    with pytest.raises(ValueError, match=r"padding cannot be read"):
        padding_mask(batch)


@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_statistics_and_loss_obey_a_square_mask(side, form):
    model = make_llama().double()
    real = flat(side, [8, 5, 6])
    ids = make_tokens(3, 8).masked_fill(~real, 7)
    allowed = square(real, own=True)
    mask = allowed if form == "bool" else additive(allowed).double()
    places = (real.long().cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    samples = [{"input_ids": row[keep][None]} for row, keep in zip(ids, real, strict=True)]
    expected = naive.statistics(model, samples, LAYERS)
    found = collect(model, [batch], find_targets(model), {"input_norm", "gradient_l2"}, num_samples=3, progress=False)
    for name, entry in found.items():
        for key in ("input_norm", "gradient_l2"):
            wanted = torch.as_tensor(expected[name][key])
            torch.testing.assert_close(
                getattr(entry, key).double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()), msg=f"{name} {key}"
            )
    both = {**batch, "attention_mask": real.long()}
    for score in ("wanda", "gblm"):
        masks = [prune(copy.deepcopy(model), [b], score, num_samples=3, progress=False) for b in (batch, both)]
        assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


@pytest.mark.parametrize("score", ["wanda", "gblm"])
def test_a_mask_for_each_kind_of_layer(score):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=8, vocab_size=128, sliding_window=4, attn_implementation="eager"
    )
    model, real = Gemma2ForCausalLM(config).eval(), flat("right", [8, 5, 2, 6])
    ids, whole = make_tokens(4, 8).masked_fill(~real, 7), square(real, own=True)
    near = whole & torch.ones(8, 8, dtype=torch.bool).triu(-3)
    masks = {"full_attention": additive(whole), "sliding_attention": additive(near)}
    found, expected = (
        prune(copy.deepcopy(model), [{"input_ids": ids, "attention_mask": m}], score, num_samples=4, progress=False)
        for m in (masks, real.long())
    )
    assert all(torch.equal(found[n], expected[n]) for n in expected)


# -- which tokens are predicted --------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [None, "ids", "some"])
def test_prune_training_and_evaluation_predict_the_same_tokens(side, labels):
    torch.manual_seed(0)
    module = CausalLM(config=TINY).eval()
    model = module.model.double()
    real = flat(side, [8, 5, 6])
    ids = make_tokens(3, 8, vocab=300).masked_fill(~real, 7)
    batch = {"input_ids": ids, "attention_mask": real.long()}
    wanted = ids.clone()
    if labels is not None:  # whoever made them: padding is never predicted
        if labels == "some":
            wanted[:, ::3] = -100
        batch["labels"] = wanted
    losses, total, count = [], 0.0, 0
    for row, label, keep in zip(ids, wanted, real, strict=True):
        logits = model(row[keep][None]).logits[0]
        targets = label[keep][1:]
        each = -logits.log_softmax(-1)[:-1].gather(1, targets.clamp(min=0)[:, None])[:, 0][targets != -100]
        losses.append(each.mean())
        total, count = total + float(each.sum()), count + len(each)
    torch.testing.assert_close(causal_lm_loss(model, batch), torch.stack(losses))
    # Left padding shifts the positions that the model makes up itself; rotary ones do not mind.
    torch.testing.assert_close(module.calibration_loss(batch), torch.stack(losses))
    found, tokens = module._token_losses(batch)
    assert int(tokens) == count
    assert float(found.sum()) == pytest.approx(total, rel=1e-9)
    if labels is None:
        windows = [{"input_ids": row, "attention_mask": keep.long()} for row, keep in zip(ids, real, strict=True)]
        assert perplexity(model, windows).nll == pytest.approx(total / count, rel=1e-9)


def test_texts_of_a_packed_row_do_not_predict_each_other():
    ids = torch.arange(1, 10)[None]
    expected = [[-100, 2, 3, -100, 5, 6, 7, -100, 9]]
    starts = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])}
    assert next_token_labels({"input_ids": ids, **starts}).tolist() == expected
    lengths = {"cu_seq_lens_q": torch.tensor([0, 3, 7, 9], dtype=torch.int32)}
    assert next_token_labels({"input_ids": ids, **lengths}).tolist() == expected
    texts = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    own = (texts[:, None] == texts[None]) & torch.ones(9, 9, dtype=torch.bool).tril()
    pairs = own[None, None]
    later = torch.ones(9, 9, dtype=torch.bool).tril(-3)  # a head that sees no near token hides none from the others
    kinds = {"full_attention": own[None, None], "chunked_attention": additive(pairs)}
    for mask in (pairs, pairs.long(), additive(pairs), own, own[None], torch.stack([own, later & own])[None], kinds):
        assert next_token_labels({"input_ids": ids, "attention_mask": mask}).tolist() == expected
    assert next_token_labels({"input_ids": ids, "labels": ids, "attention_mask": pairs}).tolist() == expected
    plain = next_token_labels({"input_ids": ids.expand(2, -1), "position_ids": torch.arange(9)[None]})
    assert plain[:, 1:].tolist() == ids[:, 1:].expand(2, -1).tolist()


def test_a_sample_without_a_label_has_no_loss():
    model, ids = make_llama().eval(), make_tokens(3, 6)
    labels = ids.clone()
    labels[1] = -100
    losses = causal_lm_loss(model, {"input_ids": ids, "labels": labels})
    assert losses.isnan().tolist() == [False, True, False]
    losses[~losses.isnan()].sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    with pytest.raises(ValueError, match=r"labels of sample\(s\) \[1\] leave no token to predict"):
        causal_lm_losses(torch.zeros(3, 6, 128), labels)


def test_virtual_tokens_of_peft_have_no_label():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(make_llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    ids, mask = make_tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    labels = ids.clone()
    labels[1, 2:4] = -100
    losses = causal_lm_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    expected = [model(input_ids=ids[[i]], attention_mask=mask[[i]], labels=labels[[i]]).loss for i in range(2)]
    torch.testing.assert_close(losses, torch.stack(expected))
    assert prune(model, [ids], "gblm", num_samples=2, progress=False)


def test_a_mask_of_another_length_than_the_labels():
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    with pytest.raises(ValueError, match=r"attention mask has shape \(2, 3\), the labels \(2, 4\)"):
        next_token_labels(batch)
