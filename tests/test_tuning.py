"""Tuning a tiny model: it helps, it survives being killed, and it says in one sentence what went wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.cli import build_parser
from engine.errors import InvalidRequestError
from engine.models.loader import load_decoder
from engine.residuals import agreement, stages, tuning, tuning_data, tuning_store
from engine.residuals.ablation import OwnKeysObjective, ablate, draft_cost, predicted_speedup, rows, table
from engine.residuals.accelerator import Accelerator, AcceleratorConfig
from engine.residuals.adapter_file import find_adapter, load_accelerator, read_card
from engine.residuals.command import parse_size
from engine.residuals.corpus import causal_attention, generate_continuations
from engine.residuals.stages import Runner
from engine.residuals.training import (
    Batch,
    BatchOrder,
    Objective,
    TrainingConfig,
    accelerate,
    evaluate,
    run_teacher,
    shift_right,
)
from engine.residuals.tuning import TuneRequest, mean_agreement, tune
from engine.residuals.tuning_store import TuningError, TuningStoppedError, cut, in_groups
from tests import tiny
from tests.tuning_worker import make_quick, small_request

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tuning") / "tiny", num_hidden_layers=5)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (tuning_data, "_SHARD_FLOPS"), (stages, "CHECKPOINT_SECONDS"), (stages, "REPORT_SECONDS"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name))
    make_quick()


@pytest.fixture(scope="module")
def undisturbed(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run that nothing happened to; its work folder lies beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    saved = tuning_data._SHARD_FLOPS, stages.CHECKPOINT_SECONDS, stages.REPORT_SECONDS
    make_quick()
    try:
        return tune(small_request(model, prompts, folder / "adapter.safetensors"), folder / "work")
    finally:
        tuning_data._SHARD_FLOPS, stages.CHECKPOINT_SECONDS, stages.REPORT_SECONDS = saved


def same_tensors(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def held_out_batches(request: TuneRequest, work: Path) -> tuple[Any, list[Batch]]:
    prepared = tuning.prepare(request, work, Runner())
    held_out = prepared.held_out
    return prepared.decoder, [Batch(cut(held_out, group)) for group in in_groups(held_out, 512)]


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_tuning_from_nothing_raises_the_acceptance(
    family: str, model: Path, prompts: Path, tmp_path: Path
) -> None:
    if family != "llama":
        model = tiny.save_model(tmp_path / family, family, num_hidden_layers=5)
    request = replace(small_request(model, prompts, tmp_path / "a.safetensors", steps=60))
    request = replace(request, data=replace(request.data, num_tokens=2000, num_held_out=8))
    path = tune(request, tmp_path / "work")
    decoder, batches = held_out_batches(request, tmp_path / "work")
    tuned = load_accelerator(path, decoder)
    untrained = Accelerator(tuned.config, decoder.config)
    untrained.draft_vocab = tuned.draft_vocab
    before = evaluate(Objective(decoder, untrained, TrainingConfig()), batches)
    after = evaluate(Objective(decoder, tuned, TrainingConfig()), batches)
    assert after[0] > before[0] + 0.2 and after[2] > before[2] + 0.2
    card = read_card(path)["measured"]["greedy_agreement_by_draft_position"]["held_out"]
    # the card's figures are those of the float32 parameters, the file holds bfloat16
    assert card == pytest.approx(after, abs=0.05)


def test_killed_at_random_moments_it_ends_with_the_same_result(
    model: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, choose = tmp_path / "adapter.safetensors", random.Random()
    command = [sys.executable, "-m", "tests.tuning_worker"]
    command += [str(word) for word in (model, prompts, tmp_path / "work", out)]
    for limit in (3, 25, 40, 10**6):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
        assert process.stdout is not None
        reports = choose.randint(1, limit) if limit < 10**6 else limit
        for _, line in zip(range(reports), process.stdout, strict=False):
            last = line
        if limit < 10**6:
            os.kill(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        print(f"killed after {reports} reports at {last.strip()}")
    assert process.returncode == 0
    assert same_tensors(out, undisturbed)


def test_stopped_in_each_stage_it_goes_on(
    model: Path, prompts: Path, undisturbed: Path, tmp_path: Path, quick: None
) -> None:
    request = small_request(model, prompts, tmp_path / "adapter.safetensors")
    for stage in ("generate", "cache", "initialise", "train", "evaluate"):
        cancel, seen = threading.Event(), []

        def watch(progress: Any, stage: str = stage, cancel: Any = cancel, seen: Any = seen) -> None:
            seen.append((progress.stage, progress.done))
            if progress.stage == stage and progress.done > 0:
                cancel.set()

        if stage == "evaluate":  # measuring is one batch: it is over before it can be stopped
            tune(request, tmp_path / "work", watch, cancel)
        else:
            with pytest.raises(TuningStoppedError, match="goes on"):
                tune(request, tmp_path / "work", watch, cancel)
            assert seen[-1][0] == stage
    assert same_tensors(request.out or tmp_path, undisturbed)


def test_what_was_stopped_is_not_done_again(
    model: Path, prompts: Path, tmp_path: Path, quick: None
) -> None:  # fmt: skip
    request = small_request(model, prompts, tmp_path / "adapter.safetensors")
    cancel, starts = threading.Event(), []

    def watch(progress: Any) -> None:
        if progress.stage == "train" and progress.done >= 10:
            cancel.set()

    with pytest.raises(TuningStoppedError):
        tune(request, tmp_path / "work", watch, cancel)
    tune(request, tmp_path / "work", lambda p: starts.append((p.stage, p.done)))
    assert next(done for stage, done in starts if stage == "train") == 10.0


def test_a_finished_run_is_not_repeated(
    model: Path, prompts: Path, undisturbed: Path, quick: None
) -> None:  # fmt: skip
    seen: list[str] = []
    request = small_request(model, prompts, undisturbed)
    assert tune(request, undisturbed.parent / "work", lambda p: seen.append(p.stage)) == undisturbed
    assert "train" not in seen


def test_training_goes_on_from_an_accelerator(
    model: Path, prompts: Path, undisturbed: Path, quick: None, tmp_path: Path
) -> None:
    """Its shape and its draft vocabulary are kept, the text is found again, and it drafts no worse."""
    request = small_request(model, prompts, tmp_path / "more.safetensors")
    shape = AcceleratorConfig(depth=1, rank=2, draft_vocab_size=32)  # does not count
    seen: list[str] = []
    path = tune(
        replace(request, start=undisturbed, accelerator=shape), undisturbed.parent / "work",
        lambda p: seen.append(p.stage),
    )  # fmt: skip
    assert "generate" not in seen and "initialise" not in seen
    first, second = read_card(undisturbed), read_card(path)
    assert second["accelerator"] == first["accelerator"] and not same_tensors(undisturbed, path)
    assert second["training"]["went_on_from"] == first["training"]
    before, after = (mean_agreement(card["measured"]) for card in (first, second))
    assert after > before - 0.05


def test_what_a_row_writes_does_not_depend_on_the_others(model: Path) -> None:
    """Rows that have ended leave, and the others go on as if they were alone."""
    decoder = load_decoder(model, "fp64")
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 40, (24,), generator=generator).tolist()
    prompts = [torch.randint(3, 200, (size,), generator=generator).tolist() for size in sizes]
    eos_ids = list(range(3, 40))
    together = generate_continuations(decoder, prompts, [0.0] * 24, 80, eos_ids)
    assert len(set((together.lengths - together.prompt_lengths).tolist())) > 5
    for row, prompt in enumerate(prompts):
        alone = generate_continuations(decoder, [prompt], [0.0], 80, eos_ids)
        length = int(alone.lengths[0])
        assert length == int(together.lengths[row]) and together.prompt_lengths[row] == len(prompt)
        assert torch.equal(alone.tokens[0, :length], together.tokens[row, :length])


def test_attention_with_gradients_is_the_same_in_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 16, generator=generator) for heads in (6, 2, 2))
    exact = causal_attention(q.requires_grad_(True), k, v)
    narrow = q.detach().bfloat16().requires_grad_(True)
    out = causal_attention(narrow, k.bfloat16(), v.bfloat16())
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)
    for each in (exact, out):
        each.float().square().sum().backward()
    assert q.grad is not None and narrow.grad is not None
    torch.testing.assert_close(narrow.grad.float(), q.grad, atol=0.08, rtol=0.08)


def test_a_sampled_token_comes_as_often_as_the_model_has_it(model: Path) -> None:
    decoder, rows, heat = load_decoder(model, "fp32"), 4000, 0.7
    with torch.random.fork_rng():
        torch.manual_seed(3)
        text = generate_continuations(decoder, [[5, 9, 30]] * rows, [heat] * rows, 1, [])
    hidden = run_teacher(decoder, torch.tensor([[5, 9, 30]]), 0).final[:, -1:]
    logits = decoder.weights.lm_head(hidden * decoder.weights.final_norm)[0, 0]
    expected = rows * (logits / heat).softmax(-1)
    counts = torch.bincount(text.tokens[:, 3].long(), minlength=len(expected))
    often = expected > 5
    surprise = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert often.sum() > 20 and abs(surprise - often.sum()) < 4 * (2 * often.sum()) ** 0.5


def test_agreement_on_suites_goes_into_the_card(
    model: Path, prompts: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (undisturbed, undisturbed.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    adapter = tmp_path / undisturbed.name
    arguments = ["--model", str(model), "--adapter", str(adapter), "--suites", "", "--prompts", str(prompts)]
    assert agreement.main([*arguments, "--max-tokens", "16", "--device", "cpu", "--card"]) == 0
    result = json.loads(capsys.readouterr().out)
    shares = result["agreement"]
    assert result["suite"] == "prompts" and len(shares) == 6 and 0 < shares[0] <= 1
    card = read_card(adapter)
    assert card["measured"]["greedy_agreement_by_draft_position"] == {"prompts": shares}
    assert load_accelerator(adapter, load_decoder(model, "fp32"))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signal")
def test_ctrl_c_on_the_command_line_keeps_the_work(model: Path, prompts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from engine.cli import main; sys.exit(main(sys.argv[1:]))"]
    command += ["tune", "--model", str(model), "--prompts", str(prompts), "--device", "cpu", "--threads", "1"]
    command += ["--depth", "2", "--rank", "4", "--draft-vocab", "64", "--tokens", "300", "--max-tokens", "16"]
    command += ["--steps", "100000", "--batch-tokens", "256"]
    environment = {**os.environ, "SLIPSTREAM_HOME": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Training (4 of 6)"):
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.startswith("Tuning was stopped; start it again")
    assert list((tmp_path / "cache" / "tuning").glob("run-*/training.safetensors"))


def test_a_full_disk_while_states_are_kept(
    model: Path, prompts: Path, undisturbed: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    request = small_request(model, prompts, tmp_path / "adapter.safetensors")
    write = tuning_store.write_whole

    def full(file: Any, content: bytes) -> None:
        if "states-00001" in file.name:
            file.write(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(tuning_store, "write_whole", full)
        with pytest.raises(TuningError, match="No space left on device") as caught:
            tune(request, tmp_path / "work")
    assert str(caught.value).count(".") <= 2 and "what is done is kept" in str(caught.value)
    assert not list((tmp_path / "work").rglob("*.part"))
    # ... and goes on without writing the text again
    monkeypatch.setattr(tuning_data, "generate_continuations", lambda *_: pytest.fail("written again"))
    assert same_tensors(tune(request, tmp_path / "work"), undisturbed)


def test_states_beyond_the_budget_are_computed_again(
    model: Path, prompts: Path, undisturbed: Path, tmp_path: Path, quick: None
) -> None:
    request = small_request(model, prompts, tmp_path / "adapter.safetensors")
    prepared = tuning.prepare(request, tmp_path / "work", Runner())
    total = sum(path.stat().st_size for path in prepared.store.folder.glob("states-*"))
    states = int(prepared.corpus.sequences.lengths.sum()) * 64 * 2
    assert prepared.corpus.kept.all() and states <= total <= states + 4096
    half = tuning.prepare(replace(request, disk_budget=states // 2), tmp_path / "other", Runner())
    kept = sum(path.stat().st_size for path in half.store.folder.glob("states-*"))
    assert 0 < kept <= states // 2 + 2048 and 0 < int(half.corpus.kept.sum()) < len(half.corpus.kept)
    # kept and computed states agree, to bfloat16
    rows = torch.arange(3)
    batch = prepared.corpus.batch(rows, torch.device("cpu"))
    again = run_teacher(prepared.decoder, batch.sequences.tokens.long(), 0).final
    assert batch.finals is not None
    for row, length in enumerate(batch.sequences.lengths.tolist()):
        torch.testing.assert_close(
            batch.finals[row, :length].float(), again[row, :length].float(), atol=0.02, rtol=0.02
        )
    assert half.corpus.batch((~half.corpus.kept).nonzero()[:2, 0], torch.device("cpu")).finals is None
    path = tune(replace(request, disk_budget=states // 2), tmp_path / "other")
    shares = [
        read_card(p)["measured"]["greedy_agreement_by_draft_position"]["held_out"]
        for p in (path, undisturbed)
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)


def test_kept_states_stand_for_the_upper_layers(model: Path) -> None:
    decoder = load_decoder(model, "fp32")
    tokens = torch.randint(3, 200, (2, 64))
    whole = run_teacher(decoder, tokens, 2)
    short = run_teacher(decoder, tokens, 2, whole.final)
    assert torch.equal(whole.final, short.final) and len(short.keys) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.keys, short.keys, strict=True))


def test_the_order_of_batches_depends_on_seed_and_step_alone() -> None:
    lengths = torch.randint(10, 300, (50,), generator=torch.Generator().manual_seed(0))
    kept = torch.arange(50) < 20
    order = BatchOrder(lengths, kept, 1024, seed=3)
    batches = [order.rows(step) for step in range(60)]
    for step in (0, 59, 17, 31):
        assert torch.equal(BatchOrder(lengths, kept, 1024, seed=3).rows(step), batches[step])
        assert torch.equal(order.rows(step), batches[step])
    seen = torch.cat(batches).tolist()
    epochs = [seen[begin : begin + 50] for begin in range(0, len(seen) - 49, 50)]
    assert len(epochs) > 2 and all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert all(bool(kept[rows].all()) or not bool(kept[rows].any()) for rows in batches)


def test_a_worse_accelerator_is_set_aside(
    model: Path, prompts: Path, tmp_path: Path, slipstream_home: Path, quick: None
) -> None:
    good = small_request(model, prompts, None, steps=40)
    path = tune(good, tmp_path / "work")
    decoder = load_decoder(model, "fp32")
    assert path.parent == slipstream_home / "data" / "adapters" and find_adapter(decoder) == path
    bad = replace(good, accelerator=AcceleratorConfig(1, 1, False, 16), steps=1)
    aside = tune(bad, tmp_path / "work")
    assert aside == path.parent / "set-aside" / path.name
    assert "agrees more often" in read_card(aside)["measured"]["note"]
    assert find_adapter(decoder) == path and load_accelerator(path, decoder).config == good.accelerator
    seen: list[str] = []
    assert tune(bad, tmp_path / "work", lambda p: seen.append(p.stage)) == aside and "train" not in seen
    assert not list((tmp_path / "work").glob("run-*/*.safetensors"))


def test_two_processes_train_together(model: Path, prompts: Path, tmp_path: Path) -> None:
    """As `accelerate launch` starts them: each takes half of the batches, and gradients are averaged."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    out = tmp_path / "adapter.safetensors"
    command = [
        sys.executable,
        "-m",
        "tests.tuning_worker",
        str(model),
        str(prompts),
        str(tmp_path / "work"),
        str(out),
        "6",
    ]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "train 6" in outputs[0] and "train" not in outputs[1]
    card = read_card(out)
    assert card["measured"]["greedy_agreement_by_draft_position"]["held_out"][0] > 0.2
    assert load_accelerator(out, load_decoder(model, "fp32")).config.rank == 8


def test_broken_lines_are_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"turns": ["a"]}\n{"turns": ["b"]\n')
    with pytest.raises(InvalidRequestError, match=r"Line 2 of mine\.jsonl is not valid JSON"):
        tune(small_request(model, path, None), tmp_path / "work")
    path.write_text('{"turns": ["a"]}\n\n{"text": "b"}\n')
    with pytest.raises(InvalidRequestError, match=r"Line 3 of mine\.jsonl needs 'turns'"):
        tune(small_request(model, path, None), tmp_path / "work")
    path.write_text('{"turns": ["a"]}\n')
    with pytest.raises(InvalidRequestError, match="Fewer than two prompts"):
        tune(small_request(model, path, None), tmp_path / "work")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accelerator": AcceleratorConfig(depth=5)}, "the model has 5"),
        ({"accelerator": AcceleratorConfig(depth=0)}, "depth must be at least 1"),
        ({"steps": 0}, "number of steps"),
        ({"disk_budget": -1}, "disk budget"),
    ],
)
def test_impossible_settings(
    model: Path, prompts: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:  # fmt: skip
    with pytest.raises(InvalidRequestError, match=said):
        tune(replace(small_request(model, prompts, None), **changes), tmp_path)


def test_two_runs_in_one_folder(model: Path, prompts: Path, tmp_path: Path) -> None:
    with tuning_store.Store(tmp_path).locked(), pytest.raises(TuningError, match="Another tuning run"):
        tune(small_request(model, prompts, None), tmp_path)


def test_a_damaged_checkpoint_is_made_again(tmp_path: Path) -> None:
    store = tuning_store.Store(tmp_path)
    store.save("training", {"a": torch.arange(9)}, 4)
    assert store.load("training") is not None
    path = store.path("training")
    path.write_bytes(path.read_bytes()[:-9])
    assert store.load("training") is None and store.load("nothing") is None


def test_sizes() -> None:
    assert (parse_size("500M"), parse_size("2g"), parse_size("0")) == (500_000_000, 2_000_000_000, 0)
    for text in ("", "much", "-1G", "nan"):
        with pytest.raises(InvalidRequestError):
            parse_size(text)
    assert build_parser().parse_args(["tune", "--no-condition"]).no_condition


def test_an_ablation_goes_on_row_by_row(
    model: Path, prompts: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.residuals.ablation.rows", lambda a, t, v: rows(a, t, v)[:2])
    request = replace(small_request(model, prompts, None, steps=4), disk_budget=0)
    monkeypatch.setattr("engine.residuals.ablation.DEEPEST", 2)
    target, cancel, seen = tmp_path / "rows.json", threading.Event(), list[str]()

    def on_row(row: dict[str, Any]) -> None:
        seen.append(row["name"])
        cancel.set()

    with pytest.raises(TuningStoppedError):
        ablate(request, tmp_path / "work", target, Runner(cancel=cancel), on_row)
    assert seen == ["untrained", "ridge exit alone", "base"]
    cancel.clear()
    report = ablate(request, tmp_path / "work", target, Runner(), on_row)
    assert seen[3:] == ["no start conditioning"]
    assert report["rows"] == json.loads(target.read_text())["rows"]
    assert [row["name"] for row in report["rows"]] == seen
    assert all(len(row["greedy_agreement_by_draft_position"]) == 6 for row in report["rows"])
    with pytest.raises(TuningError, match="another budget"):
        ablate(replace(request, steps=5), tmp_path / "work", target, Runner(), on_row)


def test_own_keys_equal_shared_ones_before_training(model: Path) -> None:
    """Without adapters and condition the accelerated stream is the slow one, and so are its keys."""
    decoder = load_decoder(model, "fp32")
    accelerator = Accelerator(AcceleratorConfig(3, 4), decoder.config)
    teacher = run_teacher(decoder, torch.randint(3, 200, (2, 64)), 3)
    condition = shift_right(teacher.final)
    objective = OwnKeysObjective(decoder, accelerator, TrainingConfig())
    shared = accelerate(accelerator, decoder, teacher, condition)
    torch.testing.assert_close(objective.accelerate(teacher, condition), shared)
    with torch.no_grad():
        assert accelerator.start is not None
        accelerator.start.add_(0.1)
    shared = accelerate(accelerator, decoder, teacher, condition)
    assert not torch.allclose(objective.accelerate(teacher, condition), shared)


def test_what_a_draft_costs(model: Path) -> None:
    decoder = load_decoder(model, "fp32")
    small, large = (draft_cost(decoder, AcceleratorConfig(k, 1, False, 16)) for k in (1, 3))
    assert 0 < small["draft_bytes_share"] < large["draft_bytes_share"] < 1
    assert predicted_speedup([0.5, 0.5, 0.5], 0.0) == {"draft_length": 3.0, "speedup": 1.875}
    assert predicted_speedup([0.1, 0.1], 0.5) == {"draft_length": 0.0, "speedup": 1.0}


def test_the_results_page_agrees_with_the_raw_figures() -> None:
    results = ROOT / "assets" / "results"
    log = json.loads((results / "accelerator-training-h100.json").read_text())
    raw = {row["name"]: row for row in log}
    page = (results / "README.md").read_text()
    gpu = page.split("<!-- gpu table -->")[1].split("<!-- end")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in gpu.strip().splitlines()[2:]]
    assert {line[0].strip("`") for line in lines} == set(raw)
    for name, _, seen, ridge, first, third in lines:
        row = raw[name.strip("`")]
        assert seen == f"{row['tokens_seen'] / 1e6:.1f}"
        shares = (row["ridge_only"][0], row["mt_bench"][0], row["mt_bench"][2])
        assert (ridge, first, third) == tuple(f"{share:.1%}".replace("%", " %") for share in shares), name
    rates = json.loads((results / "learning-rate-cpu.json").read_text())["rows"]
    for row in rates:
        shares = (row["greedy_agreement_by_draft_position"][place] for place in (0, 2))
        assert (
            f"| {row['name']} | {' | '.join(f'{share:.1%}'.replace('%', ' %') for share in shares)} |" in page
        )
    ablation = json.loads((results / "ablation-cpu.json").read_text())
    shown = page.split("<!-- ablation table -->\n")[1].split("<!-- end")[0].splitlines()
    assert set(shown) <= set(table(ablation).splitlines())
