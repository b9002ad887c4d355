"""CausalLM(read_once=True) with real processes over gloo: one reads, and all have the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import reading_worker
import torch
from launching import launch, results
from tiny import make_llama

from lightning_prune.checkpoints.sources import load_pretrained
from lightning_prune.naming import DTYPES

pytestmark = pytest.mark.distributed

SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_key_value_heads": 2}
_HALF = {"dtype": "bfloat16", "precision": "bf16-mixed", "max_steps": 1}
# Name: source, strategy, settings.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "everywhere": ("tied", "fsdp2", {"read_once": False}),
    "tied": ("tied", "fsdp2", {}),
    "frozen": ("half", "fsdp2", {**_HALF, "frozen": True, "gradient_checkpointing": True, "wide_block": True}),
    "gguf": ("model.gguf", "fsdp2", {**_HALF, "cpu_offload": True}),
    "tensor parallelism": ("tied", "tp", {"max_steps": 1}),
    "resumed everywhere": ("tied", "fsdp2", {"resume": "everywhere/step=1.ckpt", "read_once": False}),
    "resumed": ("tied", "fsdp2", {"resume": "everywhere/step=1.ckpt"}),
}
REFUSED = {
    "incomplete": ("incomplete", {}, "lacks 1 of the weights"),
    "changed": ("tied", {"changed": True}, "has changed since it was built"),
}


def write_gguf(path: Path) -> None:
    """A Llama of random weights, some of them quantized."""
    writer, numbers = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for key, value in {
        "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "context_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8, "vocab_size": 64,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    shapes = {"token_embd": (64, 32), "output": (64, 32), "output_norm": (32,)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in {
            "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (64, 32),
            "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,),
        }.items()}  # fmt: skip
    for name, shape in shapes.items():
        weight = numbers.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn" in name and len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    tied = make_llama(tie_word_embeddings=True, **SIZES)
    tied.generation_config.max_length = 33
    tied.save_pretrained(folder / "tied")
    make_llama(**SIZES).to(torch.bfloat16).save_pretrained(folder / "half")
    whole = make_llama(**SIZES)
    parts = {name: value for name, value in whole.state_dict().items() if "up_proj" not in name or ".0." in name}
    whole.save_pretrained(folder / "incomplete", state_dict=parts)
    write_gguf(folder / "model.gguf")
    return folder


@pytest.fixture(scope="module")
def fits(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all fits, in the same two processes."""
    out = tmp_path_factory.mktemp("fits")
    cases = []
    for name, (source, strategy, settings) in CASES.items():
        case = {"read_once": True, **settings, "model": str(sources / source)}
        if "resume" in settings:
            case["resume"] = str(out / settings["resume"])
        cases.append((out / name, strategy, case))
    for name, (source, settings, _) in REFUSED.items():
        case = {**settings, "model": str(sources / source), "read_once": True, "refused": True}
        cases.append((out / name, "fsdp2", case))
    done = launch(2, *cases, run=reading_worker.run)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", CASES)
def test_one_process_reads_and_all_have_the_weights(name: str, sources: Path, fits: Path) -> None:
    source, strategy, settings = CASES[name]
    once = settings.get("read_once", True)
    ranks = results(fits / name, 2)
    assert [int(state["reads"]) for state in ranks] == ([1, 0] if once and strategy == "fsdp2" else [1, 1])
    expected = load_pretrained(str(sources / source), options={"dtype": DTYPES[settings.get("dtype", "float32")]})
    if settings.get("wide_block", False):
        expected.model.layers[0].float()
    tensors = {f"begin.{n}": p.detach() for n, p in expected.named_parameters()}
    tensors |= {f"buffer.{n}": b for n, b in expected.named_buffers()}
    for state in ranks:
        assert bool(state["empty"]) == once
        assert bool(state["tied"]) == (source == "tied")
        assert [n for n, on in zip(expected.state_dict(), state["trained"], strict=False) if not on] == (
            ["model.embed_tokens.weight"] if settings.get("frozen", False) else []
        )
        found = {n: v for n, v in state.items() if n.startswith(("begin.", "buffer."))}
        assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in tensors.items()}
        assert all(torch.equal(value, tensors[n]) for n, value in found.items())


@pytest.mark.parametrize(
    ("reference", "name"),
    [("everywhere", "tied"), ("resumed everywhere", "resumed"), ("everywhere", "resumed everywhere")],
)
def test_training_goes_on_as_from_weights_read_everywhere(reference: str, name: str, fits: Path) -> None:
    for expected, found in zip(results(fits / reference, 2), results(fits / name, 2), strict=True):
        ends = [n for n in expected if n.startswith("end.")]
        assert any(not torch.equal(expected[n], expected[f"begin.{n.removeprefix('end.')}"]) for n in ends)
        assert all(torch.equal(expected[n], found[n]) for n in ends)
    for file in ("config.json", "generation_config.json"):
        texts = [json.loads((fits / each / "model" / file).read_text()) for each in (reference, name)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_stops_every_process(name: str, fits: Path) -> None:
    for rank in range(2):
        assert REFUSED[name][2] in (fits / name / f"refused{rank}").read_text()
