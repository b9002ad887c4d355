"""Exported folders in other programs, where they are installed: the same logits, and the zeros are still there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_llama, make_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_prune import prune


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def test_onnx_runtime_and_openvino(tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, ids = make_llama(), make_tokens(2, 12)
    masks = prune(model, [{"input_ids": ids}], score="wanda", sparsity=0.5, num_samples=2, progress=False)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    model.save_pretrained(tmp_path / "model")
    loaded = Logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")).eval()
    with torch.no_grad():
        expected = loaded(ids).numpy()

    file = str(tmp_path / "model.onnx")
    names = {"input_names": ["input_ids"], "output_names": ["logits"]}
    torch.onnx.export(loaded, (ids,), dynamo=True, **names).save(file)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"input_ids": ids.numpy()})[0], expected, rtol=1e-3, atol=1e-5)
    weights = [onnx.numpy_helper.to_array(w) for w in onnx.load(file).graph.initializer if len(w.dims) == 2]
    assert sum(int((weight == 0).sum()) for weight in weights) == pruned

    openvino = pytest.importorskip("openvino")
    read = openvino.Core().read_model(file)
    compiled = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(ids.numpy())[0], expected, rtol=1e-3, atol=1e-5)
    constants = [op for op in read.get_ops() if op.get_type_name() == "Constant" and len(op.shape) == 2]
    assert sum(int((np.asarray(op.data) == 0).sum()) for op in constants) == pruned
