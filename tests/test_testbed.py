"""The shipped testbed, a real trained mixture of experts: it is still a language model, and slots change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import paths
from engine.evaluation.suites import load_prompts, suite_path
from engine.experts.benchmark import rows, run_setting
from engine.experts.lanes import lanes, record_trace
from engine.experts.model import prepare_store
from engine.models.decoder import Decoder
from engine.models.loader import load_decoder
from engine.models.stepper import make_stepper
from engine.requests import Message
from engine.residuals.adapter_file import find_adapter
from engine.residuals.expert_files import find_stream
from engine.residuals.training import run_teacher
from engine.tokenizer import load_tokenizer

pytestmark = pytest.mark.real_model

TESTBED = Path(__file__).resolve().parents[1] / "assets" / "testbeds" / "smollm2-135m-moe"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def prompts(default_model_path: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(TESTBED)
    found = load_prompts(suite_path("mt_bench"), 3)
    return [tokenizer.encode_chat([Message("user", prompt.turns[0])]) for prompt in found]


@pytest.fixture(scope="module")
def testbed(default_model_path: Path) -> Decoder:
    return load_decoder(TESTBED, "int4")


def test_it_writes_much_as_the_dense_model_does(
    default_model_path: Path, testbed: Decoder, prompts: list[list[int]]
) -> None:
    dense, exact = load_decoder(default_model_path, "int4"), load_decoder(default_model_path, "bf16")
    split = load_decoder(TESTBED, "bf16")
    stepper, agreed, count = make_stepper(dense), 0, 0
    for ids in prompts:
        cache = dense.new_cache(len(ids) + NUM_TOKENS)
        stepper.prefill(ids[:-1], cache)
        text = list(ids)
        for _ in range(NUM_TOKENS):
            hidden = stepper.run_layers(
                stepper.embed(text[-1:]), cache, cache.length, 0, dense.config.num_layers
            )
            cache.length += 1
            text.append(int(stepper.logits(hidden)[0].argmax()))
        finals = [run_teacher(decoder, torch.tensor([text]), 0).final[0] for decoder in (exact, split)]
        best = [
            decoder.weights.lm_head(final * decoder.weights.final_norm.to(final.dtype)).argmax(-1)
            for decoder, final in zip((exact, split), finals, strict=True)
        ]
        agreed += int((best[0] == best[1])[len(ids) - 1 : -1].sum())
        count += NUM_TOKENS
    assert agreed / count > 0.55


def test_every_way_of_having_experts_writes_the_same(
    testbed: Decoder, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the shipped stream and accelerator."""
    monkeypatch.setenv(paths.HOME_VARIABLE, str(tmp_path))
    store = prepare_store(TESTBED, "int4")
    assert find_stream(testbed) is not None and find_adapter(testbed) is not None
    traces = [record_trace(testbed, store, ids, NUM_TOKENS) for ids in prompts[:2]]
    samples = run_setting(lanes(0.25), testbed, store, 1e9, prompts[:2], traces, NUM_TOKENS)
    assert len(samples) == len(lanes(0.25))
    assert all(row["identical_share"] == 1.0 for row in rows(samples))
