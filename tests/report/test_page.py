"""The report: what is on the page is what is in the files, whatever they are called."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from example_checkpoints import WRITERS, example_state
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.image import imread
from pruning_aware_models import batches, count, make_module, make_trainer
from report_pages import HOSTILE, Page, matrices, prune, write_results, write_run
from safetensors.torch import save_file
from tiny import TINY, make_tokens
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, PruningAwarePretraining, SparsityMonitor, WeightPruning, export
from lightning_prune.checkpoints.reading import open_checkpoint
from lightning_prune.cli import main
from lightning_prune.errors import CheckpointError, ResultsError
from lightning_prune.history import HISTORY_FILE
from lightning_prune.pruning.score_histograms import ScoreSummary
from lightning_prune.report import report
from lightning_prune.report.figures import WIDTH, histograms, line, strip
from lightning_prune.report.measure import CELLS, before_and_after, measure, open_source, read_results, structure_of
from lightning_prune.report.sections import summarize


def page_of(path: Path, tmp_path: Path, **options: object) -> tuple[str, Page]:
    file = report(path, tmp_path / "out" / "report.html", progress=False, **options)  # type: ignore[arg-type]
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    return text, page


def test_a_run_is_told_whole(tmp_path: Path) -> None:
    dense = matrices()
    save_file(dense, tmp_path / "dense.safetensors")
    run = write_run(tmp_path / "myrun", dense)
    results = write_results(tmp_path / "results.json", "myrun")
    _, page = page_of(run, tmp_path, dense=tmp_path / "dense.safetensors", results=[results])
    masks, _ = prune(dense)
    zeros = sum(int((~m).sum()) for m in masks.values())
    sparsity = zeros / sum(m.numel() for m in masks.values())
    for expected in (
        f"{100 * sparsity:.1f} %", "GBLM(alpha=100.0)", "num_samples", "seed 7", "revision abc123", "torch 2.13.0",
        "model_type llama", "62.20 → 63.60", "word frequencies alone", "(this model)", "In the dense model.",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert len(re.findall("Histogram of", page_of(run, tmp_path)[0])) == 8  # scores and weights of four types
    assert {"summary", "sparsity", "training", "masks", "histograms", "quality", "size", "tensors"} <= set(page.ids)
    assert "notes" not in page.ids  # the tuple in hparams.yaml is read


def test_each_of_several_callbacks_is_told(tmp_path: Path) -> None:
    dense = matrices()
    run = write_run(tmp_path / "run", dense)
    history = run / HISTORY_FILE
    first, *steps = history.read_text().splitlines()
    told = json.loads(first)
    other = {"name": "WeightPruning", "settings": {"score": "wanda", "targets": ["mlp"]}}
    told["run"]["callbacks"] += [other, {"name": "PERPRetraining", "settings": {"r": 8}}]
    history.write_text("\n".join([json.dumps(told), *steps]))
    facts = summarize(open_source(run))
    assert facts["Method: WeightPruning 1"]["score"] == "GBLM(alpha=100.0)"
    assert facts["Method: WeightPruning 2"] == {"score": "wanda", "targets": '["mlp"]'}
    assert facts["Method: PERPRetraining"] == {"r": "8"}


def test_a_folder_tells_how_it_was_pruned(tmp_path: Path) -> None:
    masks, _ = prune(dense := matrices())
    save_file({n: w * masks[n] for n, w in dense.items()}, tmp_path / "model.safetensors")
    settings = [{"sparsity": 0.5, "sequential": True, "update": None}, {"score": "kfac"}]
    for told in (settings, settings[:1], []):
        written = {"score": "wanda", "pattern": None, "settings": told}
        (tmp_path / "sparsity.json").write_text(json.dumps(written))
        facts = {name: fact for name, fact in summarize(open_source(tmp_path)).items() if "Method" in name}
        first = {"score": "wanda", **({"sparsity": "0.5", "sequential": "True"} if told else {})}
        assert facts == ({"Method 1": first, "Method 2": {"score": "kfac"}} if len(told) > 1 else {"Method": first})
    text, _ = page_of(tmp_path, tmp_path / "page")
    assert '<span class="muted">100.0 % kept' not in text  # of what is left


def test_the_heat_map_is_the_share_of_zeros(tmp_path: Path) -> None:
    dense = matrices()
    text, _ = page_of(write_run(tmp_path / "run", dense), tmp_path)
    masks, _ = prune(dense)
    table = text[text.index('class="heat"') : text.index("</table>")]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert rows[0] == ["block", "q", "o", "up", "down", "all"]
    for block in (0, 1):
        shares = [
            100 * float((~masks[f"model.layers.{block}.{layer}.weight"]).double().mean())
            for layer in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
        ]
        assert rows[block + 1] == [str(block), *(f"{s:.1f}" for s in shares), f"{sum(shares) / 4:.1f}"]


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    """A layer, a setting, a version or a row called like a script is shown, not run."""
    dense = matrices()
    run = write_run(tmp_path / "run", dense, hostile=HOSTILE)
    results = write_results(tmp_path / "r<b>.json", "run", hostile=HOSTILE)
    text, page = page_of(run, tmp_path, results=[results])
    assert page.text.count("alert('x')") >= 8
    assert "<script" not in text.lower()
    assert page.handlers == []
    assert set(page.tags).isdisjoint({"script", "iframe", "object", "embed", "form", "b"})
    assert HOSTILE not in text


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    dense = matrices()
    text, page = page_of(write_run(tmp_path / "run", dense), tmp_path)
    assert all(r.startswith(("data:", "#")) for r in page.references), page.references
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    assert "default-src 'none'" in text
    assert len(text) < 1_000_000


def test_pictures_show_the_density_of_the_mask(tmp_path: Path) -> None:
    dense = matrices(blocks=1)
    text, page = page_of(write_run(tmp_path / "run", dense), tmp_path, layers=["up_proj"])
    (uri,) = re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)
    pixels = imread(io.BytesIO(base64.b64decode(uri)))[:, :, :3]
    assert pixels.shape[:2] == (48, CELLS)
    # Columns below 63 are gone, those above are kept: dark on the left, bright on the right of every row.
    assert float(pixels[:, : CELLS // 2 - 1].mean()) < 0.35
    assert float(pixels[:, CELLS // 2 + 1 :, :2].mean()) > 0.8
    assert "columns 48" in page.text  # densities of 0 and 1: 48 times the variance of chance in 48 rows
    assert "rows 0" in page.text
    with pytest.raises(ValueError, match="layers='nothing' matches no pruned matrix"):
        report(tmp_path / "run", tmp_path / "r.html", layers=["nothing"], progress=False)
    for name in ("layers", "results"):
        with pytest.raises(TypeError, match=rf"{name} must be a sequence, got the string 'x'; write {name}=\['x'\]"):
            report(tmp_path / "run", tmp_path / "r.html", progress=False, **{name: "x"})


def test_structure_against_plain_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(60, 200, generator=generator) < torch.linspace(0.1, 0.9, 200)
    found = structure_of(kept)
    array = kept.numpy().astype(np.float64)
    for spread, axis, trials in ((found.row_spread, 1, 200), (found.column_spread, 0, 60)):
        densities = array.mean(axis)
        mean = densities.mean()
        assert spread == pytest.approx(densities.var() / (mean * (1 - mean) / trials), rel=1e-5)
    assert found.density.shape == (60, CELLS)
    # adaptive pooling: cell c covers columns floor(c * I / C) to ceil((c + 1) * I / C)
    naive = [array[:, c * 200 // CELLS : -(-(c + 1) * 200 // CELLS)].mean(1) for c in range(CELLS)]
    np.testing.assert_allclose(found.density.numpy(), np.stack(naive, 1), atol=1e-6)
    chance = structure_of(torch.rand(400, 400, generator=generator) < 0.5)
    assert 0.7 < chance.row_spread < 1.3
    assert 0.7 < chance.column_spread < 1.3
    assert structure_of(torch.ones(3, 4, dtype=torch.bool)).spread == 0.0


def test_weight_histograms_count_the_dense_model(tmp_path: Path) -> None:
    dense = matrices(blocks=1)
    save_file(dense, tmp_path / "dense.safetensors")
    source = open_source(write_run(tmp_path / "run", dense))
    masks, _ = prune(dense)
    with_dense = measure(source.checkpoint, tmp_path / "dense.safetensors", progress=False).magnitudes.layers
    alone = measure(source.checkpoint, progress=False).magnitudes.layers
    for name, mask in masks.items():
        where = ((dense[name].abs().double().log2() + 40) * 2).floor().long()
        for counts, chosen in ((with_dense[f"model.{name}"].kept, mask), (with_dense[f"model.{name}"].pruned, ~mask)):
            assert counts.tolist() == torch.bincount(where[chosen], minlength=160).tolist()
        assert torch.equal(alone[f"model.{name}"].kept, with_dense[f"model.{name}"].kept)
        assert int(alone[f"model.{name}"].pruned.sum()) == 0
    save_file({"other.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has none of the layers"):
        measure(source.checkpoint, tmp_path / "other.safetensors", progress=False)
    save_file({n: w[:, :4].contiguous() for n, w in dense.items()}, tmp_path / "thin.safetensors")
    with pytest.raises(CheckpointError, match=r"has .* of shape \(48, 4\)"):
        measure(source.checkpoint, tmp_path / "thin.safetensors", progress=False)


def test_charts() -> None:
    found = line("loss", [(0, 4.0), (10, 2.0), (20, 3.0)])
    assert found is not None
    assert found.path == f"M0.0 0.0L{WIDTH / 2:.1f} 160.0L{WIDTH:.1f} 80.0"
    assert line("one", [(3, 1.0), (3, 2.0)]) is None
    flat = line("flat", [(0, 1.0), (1, 1.0)])
    assert flat is not None
    assert "nan" not in flat.path
    assert strip(torch.tensor([0.0, 1.0])).startswith("M0 160V160.0h300.00V0.0")
    assert histograms(ScoreSummary(), {"a": "b"}) == []
    summary = ScoreSummary()
    summary.add("a", torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[False, True, True, True]]), 4)
    (drawn,) = histograms(summary, {"a": "up", "missing": "up"})
    assert (drawn.kept_share, drawn.overlap) == (0.75, 0.0)
    assert (drawn.kept.count("M"), drawn.pruned.count("M")) == (3, 1)


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_every_format_that_inspect_reads(tmp_path: Path, write: object) -> None:
    (tmp_path / "m").mkdir()
    path = write(tmp_path / "m", example_state())  # type: ignore[operator]
    _, page = page_of(path, tmp_path)
    assert "Sparsity" in page.text


def test_runs_are_found(tmp_path: Path) -> None:
    run = write_run(tmp_path / "lightning_logs" / "version_3", matrices())
    assert open_source(run).checkpoint.path == run / "checkpoints" / "last.ckpt"
    inside = open_source(run / "checkpoints" / "last.ckpt")
    assert inside.run is not None
    assert inside.history.run["seed"] == 7
    assert inside.hparams["betas"] == [0.9, 0.95]
    with pytest.raises(CheckpointError, match=r"did you mean .*version_3"):
        open_source(tmp_path)
    kept = tmp_path / "project" / "newer" / "checkpoints" / "last.ckpt"  # of another logger, which writes no files
    kept.parent.mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "last.ckpt", kept)
    with pytest.raises(CheckpointError, match=r"did you mean '.*newer', the newest of 2 runs in it\?"):
        open_source(tmp_path)
    with pytest.raises(CheckpointError, match=r"did you mean '.*newer.checkpoints.last\.ckpt'\?"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model"):
        open_source(tmp_path / "empty")


def test_checkpoints_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """`SparsityMonitor` or the command line's file names where ModelCheckpoint was told to save."""
    callbacks = [ModelCheckpoint(dirpath=tmp_path / "mine"), WeightPruning(score="magnitude"), SparsityMonitor()]
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_steps=2, accelerator="cpu", callbacks=callbacks, logger=CSVLogger(tmp_path),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(CausalLM(config=TINY), DataLoader([{"input_ids": row} for row in make_tokens(8, 8)], batch_size=4))
    run = Path(trainer.log_dir or "")
    assert not (run / "checkpoints").exists()
    source = open_source(run)
    assert source.checkpoint.path.parent == tmp_path / "mine"
    assert source.history.run["callbacks"][0]["name"] == "WeightPruning"
    (run / HISTORY_FILE).unlink()
    with pytest.raises(CheckpointError, match="holds no model"):
        open_source(run)
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": f"{tmp_path}/mine"}}
    (run / "config.yaml").write_text(json.dumps({"trainer": {"callbacks": [saving]}}))
    assert open_source(run).checkpoint.path.parent == tmp_path / "mine"
    # Of the folder alone nothing is known but the model.
    alone = open_source(tmp_path / "mine")
    assert (alone.run, alone.history.run) == (None, {})
    assert "50.0 %" in page_of(tmp_path / "mine", tmp_path)[1].text


def test_shrunk_models_tell_their_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = make_module()
    before = count(module)
    callback = PruningAwarePretraining(target=0.6, end=4)
    trainer = make_trainer(callback, max_steps=6)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export(tmp_path / "last.ckpt", tmp_path / "exported", tokenizer="none")
    after = count(module)
    assert after < 0.7 * before
    for path in (tmp_path / "last.ckpt", tmp_path / "exported"):
        text, page = page_of(path, tmp_path)
        assert f"{before:,} → {after:,}" in page.text
        assert f"{100 * after / before:.1f} % of the" in page.text
        assert "smaller and faster wherever it runs" in page.text
        assert "Nothing is pruned" not in text
    ffn = module.model.config.intermediate_size
    assert f"48 → {ffn}" in page_of(tmp_path / "last.ckpt", tmp_path)[1].text


def test_two_of_four_is_told_exactly(tmp_path: Path) -> None:
    weights = matrices()
    for weight in weights.values():
        groups = weight.abs().view(-1, 4)
        weight.view(-1, 4)[groups < groups.topk(2, dim=1).values[:, 1:]] = 0
    save_file(weights, tmp_path / "model.safetensors")
    text, page = page_of(tmp_path / "model.safetensors", tmp_path)
    assert "2:4 followed by every pruned matrix" in page.text
    # Every cell of the table and the total.
    assert re.findall(r"(\d\d\.\d+) %", text[text.index('id="sparsity"') : text.index('id="masks"')]) == ["50.0"] * (
        text[text.index('id="sparsity"') : text.index('id="masks"')].count(" %")
    )


def test_damaged_side_files_are_notes_and_run_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", matrices())
    bomb = tmp_path / "bomb"
    (run / "hparams.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {bomb}']\nb: 1\n")
    (run / "config.yaml").write_text("a: [1, 2\n")
    (run / "metrics.csv").write_bytes(b"step,loss\n\xff\xfe,1\n")
    (run / "sparsity_history.jsonl").write_text('{"step": 1, "layers": {"a": 3}}\nnonsense\n')
    _, page = page_of(run, tmp_path)
    assert not bomb.exists()
    assert "config.yaml was left out" in page.text
    assert "metrics.csv was left out" in page.text


def test_results_of_every_writer(tmp_path: Path) -> None:
    def write(data: object) -> Path:
        (tmp_path / "r.json").write_text(json.dumps(data))
        return tmp_path / "r.json"

    texts = [{"text": "wiki", "perplexity": 24.0}, {"text": "books", "perplexity": 30.0}]
    pruned = [{"text": "wiki", "perplexity": 36.0}, {"text": "books", "perplexity": 41.0}]
    task = {"task": "blimp", "metric": "acc", "value": 0.8}
    evaluated = {
        "kind": "lightning-prune evaluate",
        "models": [
            {"source": "dense", "role": "baseline", "prunable": 100, "zeros": 0, "texts": texts, "tasks": [task]},
            {"source": "out/model", "role": "model", "prunable": 100, "zeros": 50, "texts": pruned, "tasks": []},
        ],
    }
    found = read_results(write(evaluated))
    assert found.rows[0].values["blimp, acc"] == 0.8
    assert found.rows[1].values["sparsity"] == 0.5
    assert before_and_after([found], Path("elsewhere")) == ("perplexity, wiki", 24.0, 36.0)
    bench = {
        "environment": {"torch": "2.13.0"},
        "rows": [
            {"implementation": "reference", "method": "dense", "perplexity": {"wiki": 24.0}},
            {
                "implementation": "ours",
                "method": "kfac",
                "perplexity": {"wiki": 35.5},
                "seconds": {"total": 9.0, "a": 1.0},
            },
        ],
    }
    found = read_results(write(bench))
    assert found.rows[1].label == "ours, kfac"
    assert found.rows[1].values == {"perplexity, wiki": 35.5, "seconds": 9.0}
    assert found.facts == {"environment": {"torch": "2.13.0"}}
    assert read_results(write({"latency_ms": 3.5})).rows[0].values == {"latency_ms": 3.5}
    assert read_results(write([{"a": i} for i in range(100)])).left_out == 40
    for empty in ([], {}, {"models": []}, [1, 2], {"a": "b"}, {"a": float("nan")}):
        with pytest.raises(ResultsError, match="holds no measurements"):
            read_results(write(empty))
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ResultsError, match="cannot be read"):
        read_results(tmp_path / "r.json")
    with pytest.raises(ResultsError, match="cannot be read"):
        read_results(tmp_path / "none.json")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "run", matrices())
    results = write_results(tmp_path / "results.json", "run")
    output = tmp_path / "page.html"
    assert main(["report", str(run), "-o", str(output), "--results", str(results), "--layers", "up_proj"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    before = output.read_bytes()
    assert main(["report", str(tmp_path / "none"), "-o", str(output)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["report", str(run), "-o", str(output), "--results", str(tmp_path / "none.json")]) == 2
    assert main(["report", str(run), "-o", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert output.read_bytes() == before  # what was there survives
    assert not list(tmp_path.glob(".page.html.*"))


def test_a_dense_model_and_broken_masks_are_told(tmp_path: Path) -> None:
    save_file(matrices(), tmp_path / "dense.safetensors")
    _, page = page_of(tmp_path / "dense.safetensors", tmp_path)
    assert "Nothing is pruned." in page.text
    assert "masks" not in page.ids
    run = write_run(tmp_path / "run", matrices())
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    weight = next(w for n, w in checkpoint["state_dict"].items() if "q_proj" in n)
    weight[weight == 0] = 1e-30
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    assert "Masks broken." in page_of(run, tmp_path)[1].text


def test_no_file_but_a_report_is_written_over(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    save_file(matrices(), model)
    before = model.read_bytes()
    with pytest.raises(ValueError, match=r"output='.*model.safetensors' is there, and is no report"):
        report(tmp_path, model, progress=False)
    with pytest.raises(ValueError, match=r"output='.*page.html' cannot be written \(Not a directory"):
        report(tmp_path, model / "page.html", progress=False)
    assert model.read_bytes() == before
    page = tmp_path / "page.html"
    page.touch()
    for _ in range(2):
        assert report(tmp_path, page, progress=False).stat().st_size > 1000
