import copy
import json
import math
import types
import warnings

import pytest
import torch
from measured_models import make_models

from lightning_prune.checkpoints.inspection import Inspection
from lightning_prune.checkpoints.model import LoadedModel
from lightning_prune.cli import main
from lightning_prune.evaluation import latency as semi_structured
from lightning_prune.evaluation.latency import Timing, benchmark, remarks_on


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def test_figures_are_those_of_the_models(files):
    found = benchmark(
        files.pruned, files.dense, batch_size=2, prompt_tokens=8, new_tokens=3, repeats=4, warmup=1, progress=False
    )
    assert [m.name for m in found.models] == ["dense", "pruned"]
    assert [m.sparsity for m in found.models] == [0.0, 0.5]
    for model, folder in zip(found.models, (files.dense, files.pruned), strict=True):
        assert model.weight_bytes == 4 * sum(p.numel() for p in files.model.parameters())
        assert model.file_bytes == (folder / "model.safetensors").stat().st_size
        for timing in (model.prefill, model.decode):
            assert 0 < timing.low <= timing.median <= timing.high
            assert timing.repeats == 4
        assert model.prefill_tokens_per_second == pytest.approx(16 / model.prefill.median)
        assert model.decode_tokens_per_second == pytest.approx(2 / model.decode.median)
        assert model.peak_bytes is None  # the CPU's allocator keeps no maximum
    assert "peak memory" not in found.tables()[0].markdown()
    text = " ".join(found.remarks)
    assert "need CUDA, and were not measured on cpu" in text
    assert "2:4 gains nothing" in text


def test_rows_without_zeros_are_measured_where_they_can_be(files):
    settings = {"prompt_tokens": 8, "new_tokens": 2, "repeats": 2, "warmup": 0, "progress": False}
    found = benchmark(files.pruned, files.dense, csr=True, device="cpu", **settings)
    assert [m.name for m in found.models] == ["dense", "pruned", "pruned, CSR"]
    loaded = LoadedModel("m", copy.deepcopy(files.model), None)
    layers = semi_structured._layers(loaded.model, loaded.inspection())
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.masked_fill_(torch.rand_like(layer.weight) < 0.5, 0.0)
    left = sum(int(layer.weight.count_nonzero()) for layer in layers.values())
    saved = sum(4 * layer.weight.numel() - 4 * (layer.out_features + 1) for layer in layers.values()) - 8 * left
    ids = torch.randint(320, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, size = loaded.model(ids).logits, semi_structured._weight_bytes(loaded.model)
        rows = semi_structured.csr_copy(loaded.model, loaded.inspection())
        torch.testing.assert_close(rows(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert semi_structured._weight_bytes(rows) == size - saved
    with pytest.raises(ValueError, match=r"weights in bfloat16, MKL found; pass device='cpu' and dtype='float32'"):
        benchmark(files.pruned, csr=True, dtype="bfloat16", **settings)


def test_models_run_in_turns_and_both_ways_round(files, monkeypatch):
    from lightning_prune.evaluation import latency

    order = []
    run = latency._Entry.run
    monkeypatch.setattr(latency._Entry, "run", lambda self, *args: order.append(self.name) or run(self, *args))
    benchmark(files.pruned, files.dense, prompt_tokens=4, new_tokens=1, repeats=2, warmup=1, progress=False)
    assert order == ["dense", "pruned", "pruned", "dense", "dense", "pruned"]


def test_decoding_is_greedy_generation(files):
    """What is timed is what a model does that writes: the same tokens as transformers' generate."""
    from lightning_prune.evaluation import latency

    prompt = torch.randint(320, (2, 6), generator=torch.Generator().manual_seed(1))
    tokens = []
    handle = files.model.get_input_embeddings().register_forward_hook(lambda m, args, out: tokens.append(args[0]))
    found = LoadedModel("m", files.model, None).inspection()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # names of arguments that transformers is about to drop
        latency._Entry("m", "m", found, files.model, None).run(prompt, 4)
    handle.remove()
    assert torch.equal(tokens[0], prompt)
    expected = files.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=4, min_new_tokens=4,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(torch.cat(tokens[1:], 1), expected[:, 6:])


def test_models_without_a_cache_are_refused(caplog):
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, XLNetConfig, XLNetLMHeadModel

    gpt = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=32, d_model=8, n_layer=1, n_head=2, d_inner=8))
    for model in (gpt, xlnet):  # the latter takes texts of any length, and says -1
        with pytest.raises(ValueError, match=f"{type(model).__name__}.* returns no past_key_values"):
            benchmark(model, prompt_tokens=8, new_tokens=2, repeats=2, device="cpu", progress=False)
    assert "deprecated" not in caplog.text


def test_unstructured_zeros_gain_nothing_and_it_says_so():
    report = types.SimpleNamespace(pattern=None, sparsity=0.5)
    text = " ".join(remarks_on(report, "reason"))
    assert "Unstructured sparsity gains nothing in speed, memory or size" in text
    assert remarks_on(types.SimpleNamespace(pattern=None, sparsity=0.0), "reason") == [
        "The model has no zeros in layers that can be pruned."
    ]
    assert remarks_on(types.SimpleNamespace(pattern="2:4", sparsity=0.5), None) == []


def test_when_sparse_products_are_not_used(files, monkeypatch):
    pruned = LoadedModel("m", files.model, None).inspection()
    dense = Inspection("", "", 0, [])
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    why = semi_structured.why_not_sparse
    assert "need 2:4" in why(dense, files.model, cuda)
    assert "need CUDA" in why(pruned, files.model, cpu)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in why(pruned, files.model, cuda)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    assert "need float16 or bfloat16" in why(pruned, files.model, cuda)
    half = type(files.model)(files.model.config).half()
    assert "do not take the shape of model.layers.0.self_attn.q_proj" in why(pruned, half, cuda)


def test_sparse_layers_are_those_that_were_pruned(files, monkeypatch):
    """The kernels need CUDA: only which weights are handed to them is tested."""
    handed = []
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", lambda weight: handed.append(weight.shape) or weight)
    model = type(files.model)(files.model.config)
    semi_structured.sparse_copy(model, LoadedModel("m", files.model, None).inspection())
    assert len(handed) == 14
    assert model.lm_head.weight.requires_grad
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA of compute capability 8.0 or above")
def test_sparse_products_on_cuda(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_prune import prune

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 320}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).bfloat16()
    prune(model, score="magnitude", pattern="2:4", progress=False)
    model.save_pretrained(tmp_path / "pruned")
    found = benchmark(tmp_path / "pruned", repeats=2, prompt_tokens=64, new_tokens=2, device="cuda", progress=False)
    assert [m.name for m in found.models] == ["pruned", "pruned, 2:4 sparse"]
    assert found.models[1].weight_bytes < found.models[0].weight_bytes


def test_quartiles():
    assert Timing.of([4.0, 1.0, 3.0, 2.0]) == Timing(2.5, 1.75, 3.25, 4)


def test_command(files, tmp_path, capsys):
    outputs = [str(tmp_path / "speed.json"), str(tmp_path / "speed.md")]
    options = ["--prompt_tokens", "8", "--new_tokens", "2", "--repeats", "3", "--warmup", "1", "--output", *outputs]
    assert main(["benchmark", str(files.pruned), "--dense", str(files.dense), *options]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "speed.json").read_text())
    document = (tmp_path / "speed.md").read_text()
    dense, pruned = results["models"]
    assert f"{1e3 * pruned['prefill']['median']:.2f} ms" in document
    ratio = pruned["decode"]["median"] / dense["decode"]["median"]
    assert f"| decode time / dense | 1.00 | {ratio:.2f} |" in document
    for text in ("need CUDA", "gains nothing", "medians of 3 rounds"):
        assert text in " ".join(out.split())
        assert text in document
    assert math.isfinite(ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "1"], "repeats=1 must be a whole number of at least 2"),
        (["--batch_size", "0"], "batch_size=0 must be a whole number of at least 1"),
        (["--warmup", "-1"], "warmup=-1 must be a whole number of at least 0"),
        (["--prompt_tokens", "60", "--new_tokens", "5"], "more than the 64 tokens"),
        (["--dense", "/no/such"], "dense='/no/such' is not an existing file"),
        (["--device", "cuda:99"], "device='cuda:99' is not there"),
        (["--dense", "./none"], "dense='./none' is not an existing file"),
    ],
)
def test_user_errors_are_one_line(options, message, files, capsys):
    assert main(["benchmark", str(files.pruned), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
