"""Prove that a change of the code changes no result: run the same jobs with two trees of the package and compare.

Every job is seeded and leaves check sums: of masks, weights, losses and written files. Only the public names of the
package are used, so that the trees may be laid out differently.

    python tests/benchmarks/same_results.py --package OLD_TREE --json before.json
    python tests/benchmarks/same_results.py --package NEW_TREE --json after.json
    python tests/benchmarks/same_results.py --compare before.json after.json

With ``--model`` (and ``--calibration``, ``--evaluation``, as the other scripts take them) the masks and perplexities of
a real model are compared as well.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
SCORES = ("magnitude", "random", "wanda", "gradient", "gblm", "kfac", "sparsegpt")
PRUNINGS: dict[str, dict[str, Any]] = {
    **{score: {"score": score} for score in SCORES},
    "wanda 2:4": {"score": "wanda", "pattern": "2:4"},
    "gblm 4:8 l1": {"score": "gblm", "pattern": "4:8", "grad_norm": "l1"},
    "gblm global": {"score": "gblm", "group": "global"},
    "wanda owl": {"score": "wanda", "allocation": "owl"},
    "magnitude mapping": {"score": "magnitude", "sparsity": 0.5, "allocation": {"mlp": 0.6}},
    "wanda walk": {"score": "wanda", "sequential": True},
    "kfac obs walk": {"score": "kfac", "update": "obs", "sequential": True},
    "sparsegpt 2:4 walk": {"score": "sparsegpt", "pattern": "2:4", "sequential": True},
}
REAL = ("wanda", "gblm", "kfac", "wanda 2:4", "wanda walk", "kfac obs walk")
Job = Callable[[], Mapping[str, Any]]


def check_sum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def of_files(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files below a folder that match, by relative name."""
    found = sorted(path for pattern in patterns for path in folder.rglob(pattern))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in found}


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=128, max_position_embeddings=64, initializer_range=0.1
    )
    return LlamaForCausalLM(config).eval()


def tokens(samples: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(128, (samples, length), generator=torch.Generator().manual_seed(seed))


# -- jobs ------------------------------------------------------------------------------------------------------------


def prune_job(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """`prune` on a tiny Llama."""
    import lightning_prune as lp

    model, ids = tiny_llama(), tokens(8, 24)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(2)]
    masks = lp.prune(model, batches, num_samples=8, progress=False, **settings)
    return {"masks": check_sum(masks), "weights": check_sum(model.state_dict())}


def fit_job(callbacks: Callable[[], list[Any]], steps: int = 8) -> Mapping[str, Any]:
    """A fit of a user's own module around a tiny Llama: losses, weights, and the callbacks' states."""
    import lightning as L
    from torch.utils.data import DataLoader

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = tiny_llama(), list[float]()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.model(input_ids=batch, labels=batch).loss
            self.losses.append(float(loss))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    L.seed_everything(0, verbose=False)
    module, made = Module(), callbacks()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", callbacks=made, enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(tokens(32, 24), batch_size=4, shuffle=True))
    masks = {name: mask for callback in made for name, mask in (getattr(callback, "masks", None) or {}).items()}
    return {"losses": module.losses, "weights": check_sum(module.model.state_dict()), "masks": check_sum(masks)}


def reconstruct_job() -> Mapping[str, Any]:
    """PERP block by block."""
    import lightning_prune as lp
    from lightning_prune.perp import reconstruct

    dense, model, batches = tiny_llama(), tiny_llama(), [{"input_ids": part} for part in tokens(8, 24).split(2)]
    masks = lp.prune(model, batches, score="wanda", num_samples=8, progress=False)
    reconstruct(model, batches, dense, masks, steps=4, num_samples=8, progress=False)
    return {"weights": check_sum(model.state_dict())}


def structured_job() -> Mapping[str, Any]:
    """Structural pruning in one shot."""
    import lightning_prune as lp

    model = tiny_llama()
    batches = [{"input_ids": part, "labels": part} for part in tokens(8, 24).split(2)]
    lp.prune_structured(model, batches, target=0.7, progress=False)
    return {"weights": check_sum(model.state_dict()), "config": model.config.to_dict()["intermediate_size"]}


def quickstart_job() -> Mapping[str, Any]:
    """The quickstart, shortened: its numbers and every model it writes."""
    from rich.console import Console

    import lightning_prune.quickstart as module

    module.MODEL = module.MODEL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory() as folder:
        console = Console(file=io.StringIO())
        module.quickstart(folder, steps=8, retrain_steps=2, num_samples=8, console=console)
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        rows = [(row["folder"], row["perplexity"], row["sparsity"]) for row in results["models"]]
        return {"rows": rows, "files": of_files(Path(folder), ["*/model.safetensors"])}


def recipe_job(name: str, tiny: Path) -> Mapping[str, Any]:
    """Two steps of a recipe through the command line."""
    from recipes import RECIPES, fit_shortened

    with tempfile.TemporaryDirectory() as folder:
        state = torch.load(fit_shortened(RECIPES / f"{name}.yaml", tiny, Path(folder)), weights_only=True)
        masks = {
            f"{key} {weight}": bits["bits"]
            for key, callback in state["callbacks"].items()
            for weight, bits in (callback.get("masks") or {}).items()
        }
        return {"weights": check_sum(state["state_dict"]), "masks": check_sum(masks)}


def real_job(settings: Mapping[str, Any], args: argparse.Namespace) -> Mapping[str, Any]:
    """`prune` and perplexities of a real model."""
    import common

    import lightning_prune as lp

    model, tokenizer = common.load(args)
    batches = common.batched(common.calibration_of(args, tokenizer), 4)
    masks = lp.prune(model, batches, num_samples=args.samples, progress=False, **settings)
    return {
        "masks": check_sum(masks),
        "weights": check_sum(dict(model.named_parameters())),
        **common.perplexities(model, common.evaluations_of(args, tokenizer)),
    }


def all_jobs(args: argparse.Namespace, tiny: Path) -> dict[str, Job]:
    import lightning_prune as lp
    from recipes import RECIPES

    def pruning(**settings: Any) -> Any:
        return lp.WeightPruning(num_samples=8, progress=False, **settings)

    shrinking = {"target": 0.7, "end": 4, "compact_every": 2}
    fits: dict[str, Callable[[], list[Any]]] = {
        "gblm": lambda: [pruning(score="gblm")],
        "cubic magnitude": lambda: [pruning(score="magnitude", sparsity=0.7, schedule=lp.CubicSchedule(1, 5, 2))],
        **{
            f"perp {adapter}": lambda adapter=adapter: [
                pruning(score="kfac"), lp.PERPRetraining(adapter=adapter, r=4)
            ]
            for adapter in ("mask_lora", "scale_lora", "lora_prune", None)
        },
        "perp rounds": lambda: [
            pruning(score="wanda", schedule=lp.LinearSchedule(0, 4, 2)), lp.PERPRetraining(adapter="mask_lora", r=4)
        ],
        "shrink A": lambda: [lp.PruningAwarePretraining(**shrinking)],
        "shrink B": lambda: [lp.PruningAwarePretraining(**shrinking, saliency="kfac", second_order=True)],
    }  # fmt: skip
    jobs: dict[str, Job] = {f"prune {name}": lambda s=s: prune_job(s) for name, s in PRUNINGS.items()}
    jobs |= {f"fit {name}": lambda c=c: fit_job(c) for name, c in fits.items()}
    jobs |= {"reconstruct": reconstruct_job, "structured": structured_job, "quickstart": quickstart_job}
    jobs |= {f"recipe {p.stem}": lambda p=p: recipe_job(p.stem, tiny) for p in sorted(RECIPES.glob("*.yaml"))}
    if args.model:
        jobs |= {f"{args.gguf_file or args.model} {n}": lambda n=n: real_job(PRUNINGS[n], args) for n in REAL}
    return jobs


def compare(before: Path, after: Path) -> int:
    """Print what differs; the exit status."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in different:
        print(f"DIFFERENT {name}\n  before {old.get(name)}\n  after  {new.get(name)}")
    print(
        f"{len(old.keys() | new.keys()) - len(different)} of {len(old.keys() | new.keys())} jobs give the same results"
    )
    return int(bool(different))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=HERE.parents[1], help="folder that holds lightning_prune/")
    parser.add_argument("--json", type=Path, help="write the check sums here")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--only", nargs="+", default=[], help="words of the jobs to run")
    parser.add_argument("--model")
    parser.add_argument("--gguf-file")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation", nargs="+", default=[])
    for name, default in (("samples", 16), ("length", 256), ("windows", 4), ("window-length", 512), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path[:0] = [str(args.package.resolve()), str(HERE), str(HERE.parent / "helpers")]
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from recipes import write_inputs

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for name, job in all_jobs(args, Path(folder)).items():
            if args.only and not any(word in name for word in args.only):
                continue
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                results[name] = job()
            print(name, {k: v for k, v in results[name].items() if isinstance(v, (str, float))}, flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
