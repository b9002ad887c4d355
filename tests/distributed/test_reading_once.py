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
from torch import Tensor

pytestmark = pytest.mark.distributed

SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_key_value_heads": 2}
# Name: source, strategy, settings. Each is one fit that reads once, and one that reads in every process.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("tied", "fsdp2", {}),
    "half, frozen, checkpointing": (
        "half", "fsdp2",
        {"dtype": "bfloat16", "precision": "bf16-true", "frozen": True, "gradient_checkpointing": True},
    ),
    "cast and offloaded": ("half", "fsdp2", {"cpu_offload": True}),
    "a wider block": ("half", "fsdp2", {"dtype": "bfloat16", "precision": "bf16-mixed", "wide_block": True}),
    "gguf": ("model.gguf", "fsdp2", {}),
    "tensor parallelism": ("tied", "tp", {}),
    "ddp": ("tied", "ddp", {"frozen": True}),
}  # fmt: skip
REFUSED = {
    "damaged": ("damaged", {}, "cannot be loaded"),
    "changed": ("tied", {"changed": True}, "has changed since it was built"),
    "adapters": ("tied", {"adapters": True}, "without read_once"),
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
    make_llama(**SIZES).save_pretrained(folder / "damaged")
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    write_gguf(folder / "model.gguf")
    return folder


@pytest.fixture(scope="module")
def fits(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all fits, in the same two processes."""
    out = tmp_path_factory.mktemp("fits")
    cases = []
    for name, (source, strategy, settings) in CASES.items():
        for read_once in (False, True):
            case = {**settings, "model": str(sources / source), "read_once": read_once}
            cases.append((out / name / str(read_once), strategy, case))
    for name, (source, settings, _) in REFUSED.items():
        case = {**settings, "model": str(sources / source), "read_once": True, "refused": True}
        cases.append((out / name, "fsdp2", case))
    done = launch(2, *cases, run=reading_worker.run)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in ("reads", "empty")}


@pytest.mark.parametrize("name", CASES)
def test_one_process_reads_and_all_have_the_weights(name: str, fits: Path) -> None:
    everywhere, once = (results(fits / name / read_once, 2) for read_once in ("False", "True"))
    assert [int(state["reads"]) for state in everywhere] == [1, 1]
    assert [int(state["reads"]) for state in once] == ([1, 0] if CASES[name][1] == "fsdp2" else [1, 1])
    assert all(state["empty"] for state in once)
    assert bool(once[0]["tied"]) == (CASES[name][0] == "tied")
    for expected, found in zip(everywhere, once, strict=True):  # before and after training, and all buffers
        assert {n: (v.dtype, v.shape) for n, v in bits(found).items()} == {
            n: (v.dtype, v.shape) for n, v in bits(expected).items()
        }
        different = [n for n, value in bits(expected).items() if not torch.equal(value, found[n])]
        assert not different
        assert any(n.startswith("buffer.") for n in found)
        assert any(n.startswith("end.") and not torch.equal(v, found[f"begin.{n[4:]}"]) for n, v in found.items())
    for file in () if name == "gguf" else ("config.json", "generation_config.json"):
        texts = [json.loads((fits / name / read_once / "model" / file).read_text()) for read_once in ("False", "True")]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_stops_every_process(name: str, fits: Path) -> None:
    for rank in range(2):
        assert REFUSED[name][2] in (fits / name / f"refused{rank}").read_text()


def test_a_fit_that_reads_once_resumes(sources: Path, fits: Path, tmp_path: Path) -> None:
    source = {"model": str(sources / "tied"), "read_once": True}
    first, second = {**source, "max_steps": 1}, {**source, "resume": str(tmp_path / "first" / "end.ckpt")}
    cases = [(tmp_path / "first", "fsdp2", first), (tmp_path / "second", "fsdp2", second)]
    done = launch(2, *cases, run=reading_worker.run)
    assert done.returncode == 0, done.stderr[-3000:]
    for expected, found in zip(results(fits / "tied" / "True", 2), results(tmp_path / "second", 2), strict=True):
        assert all(torch.equal(value, found[n]) for n, value in expected.items() if n.startswith("end."))
