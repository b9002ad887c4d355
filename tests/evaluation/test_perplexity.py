"""Perplexity against a naive reference in float64."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lightning_prune import CausalLM
from lightning_prune.evaluation.perplexity import NextTokenLoss, perplexity
from lightning_prune.pruning.running import causal_lm_losses, next_token_losses

V = 97


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def stream():
    return torch.randint(V, (1000,), generator=torch.Generator().manual_seed(1))


def naive_losses(model, ids, skip=0):
    """Loss of each next token of one window, token by token, in double precision."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    return [
        math.log(sum(math.exp(x) for x in logits[t].tolist())) - logits[t, ids[t + 1]].item()
        for t in range(len(ids) - 1)
        if t + 1 >= skip
    ]


def naive_perplexity(losses):
    return math.exp(math.fsum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_of_a_stream(model, stream, batch_size):
    expected = [x for i in range(0, 1000 - 63, 64) for x in naive_losses(model, stream[i : i + 64])]
    result = perplexity(model, stream, seq_len=64, batch_size=batch_size)
    assert result.windows == 15
    assert result.tokens == 15 * 63 == len(expected)
    assert result.seq_len == 64
    assert result.perplexity == pytest.approx(naive_perplexity(expected), rel=1e-6)
    assert result.nll == pytest.approx(math.log(result.perplexity))
    for same in (stream[None], stream.tolist(), stream.int()):
        assert perplexity(model, same, seq_len=64, batch_size=batch_size) == result


def test_max_windows_spread_or_first(model, stream):
    chosen = {True: [0, 3, 7, 11], False: [0, 1, 2, 3]}
    for spread, windows in chosen.items():
        expected = [x for i in windows for x in naive_losses(model, stream[64 * i : 64 * i + 64])]
        result = perplexity(model, stream, seq_len=64, max_windows=4, spread=spread)
        assert result.windows == 4
        assert result.perplexity == pytest.approx(naive_perplexity(expected), rel=1e-6)
    assert perplexity(model, stream, seq_len=64, max_windows=99).windows == 15


def test_stride_predicts_every_token_once(model, stream):
    short = stream[:112]
    expected = naive_losses(model, short[:64])
    for start in (16, 32, 48):
        expected += naive_losses(model, short[start : start + 64], skip=48)
    result = perplexity(model, short, seq_len=64, stride=16)
    assert result.tokens == len(expected) == 111
    assert result.perplexity == pytest.approx(naive_perplexity(expected), rel=1e-6)


@pytest.mark.parametrize("stride", [None, 16])
def test_a_token_that_every_window_begins_with(stride, model, stream):
    short, first, expected = stream[:130], torch.tensor([5]), []
    for start in range(0, 130 - 63 + 1, stride or 63):
        known = 63 - stride if stride and start else 0
        expected += naive_losses(model, torch.cat([first, short[start : start + 63]]), skip=1 + known)
    result = perplexity(model, short, seq_len=64, stride=stride, first_token=5)
    assert result.tokens == len(expected) == (127 if stride else 126)
    assert result.seq_len == 64
    assert result.perplexity == pytest.approx(naive_perplexity(expected), rel=1e-6)


def test_windows_of_a_dataset_weigh_by_tokens(model, stream):
    lengths = [10, 64, 33]
    rows = [stream[:n] for n in lengths]
    expected = [x for row in rows for x in naive_losses(model, row)]
    padded = [
        {
            "input_ids": torch.cat([torch.zeros(5, dtype=torch.long), row]),
            "attention_mask": torch.tensor([0] * 5 + [1] * len(row)),
        }
        for row in rows
    ]
    for data in (rows, [row.tolist() for row in rows], [{"input_ids": row.tolist()} for row in rows], padded):
        for batch_size in (1, 2):
            result = perplexity(model, data, batch_size=batch_size)
            assert result.tokens == sum(lengths) - 3
            assert result.seq_len == 64
            assert result.perplexity == pytest.approx(naive_perplexity(expected), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("wrapped", [False, True])
def test_packed_texts_of_a_window_are_kept_apart(wrapped, batch_size, model, stream):
    texts = [[stream[:10], stream[10:31]], [stream[40:75]], [stream[80:83], stream[83:84], stream[84:100]]]
    expected = [x for window in texts for text in window for x in naive_losses(model, text)]
    data = [
        {"input_ids": torch.cat(window), "position_ids": torch.cat([torch.arange(len(text)) for text in window])}
        for window in texts
    ]
    del data[1]["position_ids"]  # one text: these are a model's own
    data[2] = {name: [0, 0, *part.tolist()] for name, part in data[2].items()} | {"attention_mask": [0, 0] + [1] * 20}
    for window in data:
        window["length"] = [len(window["input_ids"])]  # no input of the model
    measured = model
    if wrapped:
        measured = CausalLM(config=model.config.to_dict())
        measured.model.load_state_dict(model.state_dict())
    result = perplexity(measured, data, batch_size=batch_size)
    assert result.tokens == len(expected)
    assert result.perplexity == pytest.approx(naive_perplexity(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["inputs_embeds", "cu_seq_lens_q"])
def test_inputs_that_cannot_be_cut_into_windows_are_refused(name, model, stream):
    window = {"input_ids": stream[:8], name: torch.tensor([0, 3, 8])}
    with pytest.raises(ValueError, match=rf"data\[0\] has '{name}' of shape \(3,\), .* each of the 8 tokens\. Take it"):
        perplexity(model, [window])
    assert perplexity(Fixed([0.0] * V), [window]).tokens == 7  # takes no such thing


class Around(nn.Module):
    """Takes tokens alone, or hands on what it gets; a teacher that knows fewer words comes first."""

    def __init__(self, model, hands_on):
        super().__init__()
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        self.teacher, self.model = LlamaForCausalLM(LlamaConfig(vocab_size=4, **small)), model
        if hands_on:
            self.forward = self.all

    def forward(self, input_ids):
        return self.model(input_ids).logits

    def all(self, input_ids, **others):
        return self.model(input_ids, use_cache=False, **others).logits


def test_a_module_around_a_model_is_given_what_it_takes(model, stream):
    window = {"input_ids": stream[:20], "position_ids": torch.arange(5, 25), "attention_mask": torch.ones(20)}
    assert perplexity(Around(model, False), [window]) == perplexity(model, [stream[:20]])
    window["position_ids"] = torch.cat([torch.arange(5), torch.arange(15)])
    assert perplexity(Around(model, True), [window]) == perplexity(model, [window])
    assert perplexity(model, [window]).tokens == 18


def test_a_scripted_module_is_measured(stream):
    own = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))
    assert perplexity(torch.jit.script(own), stream, seq_len=50) == perplexity(own, stream, seq_len=50)


def test_an_encoder_decoder_is_refused(stream):
    model = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    window = {"input_ids": stream[:8], "decoder_input_ids": stream[8:16], "labels": stream[9:17]}
    with pytest.raises(ValueError, match=r"model=T5ForConditionalGeneration is an encoder-decoder.*a causal language"):
        perplexity(model, [window])


@pytest.mark.parametrize("token", [-1, V, 10**6])
def test_tokens_that_the_model_does_not_know_are_refused(token, model, stream):
    strange = torch.cat([stream[:40], torch.tensor([token])])
    with pytest.raises(ValueError, match=rf"data has the token {token}, and the model .* tokens 0 to {V - 1}\."):
        perplexity(model, [stream[:8], strange], batch_size=2)
    if token > 0:
        with pytest.raises(ValueError, match=f"data has the token {token}"):
            perplexity(model, stream, seq_len=8, first_token=token)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_windows_and_labels_that_predict_nothing_do_not_count(model, stream, batch_size):
    rows = [stream[:10], stream[10:30]]
    expected = naive_losses(model, rows[0]) + naive_losses(model, rows[1], skip=7)
    answer = rows[1].clone()
    answer[:7] = -100
    padding = {"input_ids": torch.zeros(4, dtype=torch.long), "attention_mask": torch.zeros(4, dtype=torch.long)}
    data = [rows[0], padding, [5], [], {"input_ids": rows[1], "labels": answer.tolist()}]
    result = perplexity(model, data, batch_size=batch_size)
    assert (result.tokens, result.windows, result.seq_len) == (len(expected), 2, 20)
    assert result.perplexity == pytest.approx(naive_perplexity(expected), rel=1e-6)


def test_modes_are_restored(model, stream):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        perplexity(model, stream[:64], seq_len=32, progress=True)
    assert [module.training for module in model.modules()] == modes
    model.eval()


class Fixed(nn.Module):
    """Returns the same logits at every position."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids):
        return self.logits.expand(*input_ids.shape, -1)


def test_improbable_tokens_and_nan_show():
    ids = torch.tensor([0, 1, 0, 1])
    # the probability of token 1 underflows in a softmax, its loss is 500
    assert perplexity(Fixed([500.0, 0.0]), ids, seq_len=4).nll == pytest.approx(500 * 2 / 3)
    assert perplexity(Fixed([9000.0, 0.0]), ids, seq_len=4).perplexity == math.inf
    assert math.isnan(perplexity(Fixed([math.nan, 0.0]), ids, seq_len=4).perplexity)


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        (
            torch.zeros(10, dtype=torch.long),
            {"seq_len": 1},
            "seq_len=1 must be a whole number of at least 2: the",
        ),
        (torch.zeros(10, dtype=torch.long), {"seq_len": 5, "stride": 6}, "stride=6 must be at most seq_len=5"),
        (
            torch.zeros(10, dtype=torch.long),
            {"seq_len": 5, "stride": 0},
            "stride=0 must .* least 1 and at most seq_len=5",
        ),
        (torch.zeros(10, dtype=torch.long), {}, "data has 10 tokens, fewer than one window of seq_len=512"),
        (torch.zeros(10, dtype=torch.long), {"seq_len": 5, "max_windows": 0}, "max_windows=0 must be"),
        (torch.zeros(10, dtype=torch.long), {"seq_len": 5, "batch_size": 0}, "batch_size=0 must be"),
        (torch.zeros(10), {"seq_len": 5}, "integer token ids"),
        (torch.zeros(1, 2, 3, dtype=torch.long), {}, "integer token ids"),
        ("It is a truth", {}, "received str. Tokenize text first"),
        (["It is a truth"], {}, r"data\[0\] must hold token ids, .*received 'It is a truth' .*Tokenize text first"),
        ([{"text": "It"}], {}, r"data\[0\] must hold token ids, or be a dict with 'input_ids'; received \{'text'"),
        ([None], {}, r"data\[0\] must hold token ids"),
        (torch.zeros(10, dtype=torch.long), {"seq_len": "8"}, "seq_len='8' must be a whole number of at least 2"),
        (torch.zeros(10, dtype=torch.long), {"seq_len": 5, "stride": 1.5}, "stride=1.5 must .* a whole number"),
        (torch.zeros(10, dtype=torch.long), {"seq_len": 5, "max_windows": 1.5}, "max_windows=1.5 must be a whole"),
        (torch.zeros(10, dtype=torch.long), {"seq_len": 5, "first_token": -1}, "first_token=-1 must be a whole"),
        ([], {}, "empty sequence of windows"),
        ([[1, 2, 3]], {"stride": 2}, "stride=2 needs a token stream"),
        ([[1], [2]], {"max_windows": 1}, r"none of its 1 window\(s\) predicts a token"),
        (torch.zeros(3, 1, dtype=torch.long), {}, r"none of its 3 window\(s\) predicts a token"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], {}, "predicts a token"),
        ([torch.zeros(1, 3, dtype=torch.long)], {}, r"data\[0\] must hold integer .* received .* \(1, 3\)"),
        ([[1, 2], [0.5, 2.0]], {}, r"(?s)data\[1\] must hold integer .*float32"),
        ([{"input_ids": [1, 2], "labels": 1}], {}, r"data\[0\] must .* labels \(\)"),
    ],
)
def test_errors(model, data, kwargs, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, data, **kwargs)


def test_metric_reset():
    metric = NextTokenLoss(perplexity=True)
    metric.update(torch.tensor([1.0, 3.0]), 2)
    assert metric.compute().item() == pytest.approx(math.exp(2))
    metric.reset()
    metric.update(torch.tensor([1.0]), torch.tensor(1))
    assert metric.compute().item() == pytest.approx(math.e)


# ---- losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_causal_lm_losses(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 7, V, generator=generator)).to(dtype)
    labels = torch.randint(V, (3, 7), generator=generator)
    labels[1, 4:] = labels[2, 0] = labels[2, 3] = -100
    losses = causal_lm_losses(logits, labels)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b in range(3):
        log_p = logits[b].double().log_softmax(-1)
        terms = [-log_p[t, labels[b, t + 1]].item() for t in range(6) if labels[b, t + 1] != -100]
        assert losses[b].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    tokens = next_token_losses(logits, labels)
    assert tokens.shape == (3, 6)
    assert (tokens[labels[:, 1:] == -100] == 0).all()


def test_one_backward_gives_the_gradient_of_each_sample_separately():
    logits = torch.randn(2, 5, 11, requires_grad=True)
    labels = torch.randint(11, (2, 5))
    (gradient,) = torch.autograd.grad(causal_lm_losses(logits, labels)[0], logits)
    assert (gradient[1] == 0).all()
    assert (gradient[0, :-1] != 0).any()


def test_loss_errors():
    labels = torch.zeros(2, 4, dtype=torch.long)
    labels[1, 1:] = -100
    with pytest.raises(ValueError, match=r"labels of sample\(s\) \[1\] leave no token to predict"):
        causal_lm_losses(torch.zeros(2, 4, 5), labels)
    with pytest.raises(ValueError, match="leave no token"):
        causal_lm_losses(torch.zeros(1, 1, 5), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"received \(2, 3, 5\) and \(2, 4\)"):
        causal_lm_losses(torch.zeros(2, 3, 5), labels)
