"""SmolLM2 itself: logits and tokens against transformers, and int4 rows whatever shares their batch.

transformers reads the same GGUF file with its own code, so the reading of the file is tested as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.decoding.base import TokenSequence
from engine.decoding.plain import PlainDecoding
from engine.decoding.sampling import Sampler
from engine.evaluation.suites import load_prompts, suite_path
from engine.kernels import make_fused_stepper
from engine.models.decoder import Decoder
from engine.models.loader import load_decoder
from engine.models.stepper import Stepper, TorchStepper
from engine.requests import SamplingParams
from engine.tokenizer import Tokenizer, load_tokenizer
from tests import tiny

pytestmark = pytest.mark.real_model

TEXT = (
    "The ship left port at dawn. By noon the wind had turned, and the captain, who had crossed this sea eleven "
    "times, told the crew to take in the sails. def area(r): return 3.14159 * r ** 2\n\nWarum ist der Himmel blau?"
)
PROMPT = "<|im_start|>user\nName three rivers in Europe.<|im_end|>\n<|im_start|>assistant\n"
TOLERANCE = 1e-4  # of the largest logit
NUM_LAYERS = 30


@pytest.fixture(scope="module")
def tokenizer(default_model_path: Path) -> Tokenizer:
    return load_tokenizer(default_model_path)


@pytest.fixture(scope="module")
def reference(default_model_path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers computes: logits of the text, and greedy tokens of the prompt. The model goes again."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        default_model_path.parent, gguf_file=default_model_path.name, dtype=torch.float32
    ).eval()
    ids, prompt = torch.tensor(tokenizer.encode(TEXT)), torch.tensor([tokenizer.encode(PROMPT)])
    assert len(ids) > 64
    with torch.inference_mode():
        logits = model(ids[None]).logits[0]  # [T, V]
        answer = model.generate(prompt, do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
    return {"ids": ids, "logits": logits, "answer": answer[0, prompt.shape[1] :].tolist()}


@pytest.fixture(scope="module")
def exact(default_model_path: Path) -> Decoder:
    return load_decoder(default_model_path, "fp32")


@pytest.fixture(scope="module")
def packed(default_model_path: Path) -> Decoder:
    return load_decoder(default_model_path, "int4")


def make(name: str, decoder: Decoder) -> Stepper:
    return TorchStepper(decoder) if name == "torch" else make_fused_stepper(decoder)


def run(stepper: Stepper, ids: Any, cache: Any, start: int) -> Tensor:
    """Logits ``[T, V]`` of ``ids`` at positions ``start ..``."""
    hidden = stepper.embed([int(index) for index in ids])
    return stepper.logits(stepper.run_layers(hidden, cache, start, 0, NUM_LAYERS))


def assert_close(logits: Tensor, reference: dict[str, Any], rows: slice) -> None:
    wanted = reference["logits"]
    assert (logits - wanted[rows]).abs().max() < TOLERANCE * wanted.abs().max()
    assert torch.equal(logits.argmax(-1), wanted[rows].argmax(-1))


@torch.inference_mode()
def test_prefill_logits_are_those_of_transformers(exact: Decoder, reference: dict[str, Any]) -> None:
    ids, count = reference["ids"], len(reference["ids"])
    cache, positions = exact.new_cache(count), torch.arange(count)[None]
    hidden = exact.run_layers(exact.embed(ids[None]), positions, cache, 0, NUM_LAYERS, 0)
    assert_close(exact.logits(hidden)[0], reference, slice(None))
    state = exact.prefill(ids.tolist(), exact.new_cache(16), chunk=23)
    assert state is not None
    assert_close(exact.logits(state), reference, slice(count - 1, None))


@pytest.mark.parametrize("name", ["torch", "fused"])
@torch.inference_mode()
def test_step_by_step_logits_are_those_of_transformers(
    exact: Decoder, reference: dict[str, Any], name: str
) -> None:
    stepper, cache, ids = make(name, exact), exact.new_cache(16), reference["ids"][:24]
    rows = [run(stepper, ids[at : at + 1], cache, at) for at in range(len(ids))]
    assert_close(torch.cat(rows), reference, slice(0, len(ids)))


@pytest.mark.parametrize("name", ["torch", "fused"])
@torch.inference_mode()
def test_ragged_chunks_after_a_rollback_are_those_of_transformers(
    exact: Decoder, reference: dict[str, Any], name: str
) -> None:
    stepper, cache, ids = make(name, exact), exact.new_cache(16), reference["ids"]
    exact.prefill(ids[:48].tolist(), cache)
    run(stepper, ids[:8], cache, cache.length)  # drafts, all rejected
    at = cache.length = 33
    for size in (1, 3, 7, 2, 8, 5) if name == "fused" else (3, 8, 2):
        run(stepper, ids.flip(0)[:4], cache, at)  # and again
        assert_close(run(stepper, ids[at : at + size], cache, at), reference, slice(at, at + size))
        cache.length = at = at + size


@pytest.mark.parametrize("name", ["torch", "fused"])
@torch.inference_mode()
def test_greedy_tokens_are_those_of_transformers(
    exact: Decoder, reference: dict[str, Any], tokenizer: Tokenizer, name: str
) -> None:
    prompt, cache = tokenizer.encode(PROMPT), exact.new_cache(16)
    exact.prefill(prompt[:-1], cache)
    sequence = TokenSequence(list(prompt), cache, Sampler(SamplingParams()), len(prompt))
    method = PlainDecoding(make(name, exact))
    method.start(sequence)
    expected = reference["answer"][: None if name == "fused" else 12]
    for _ in expected:
        method.step(1)
    assert sequence.ids[len(prompt) :] == expected


# -- int4: the same bits whatever shares the batch -------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "fused"])
@torch.inference_mode()
def test_int4_rows_do_not_depend_on_what_follows_them(
    packed: Decoder, tokenizer: Tokenizer, name: str
) -> None:
    """Drafts behind a row, good or bad, few or many, leave its logits and its cache alone, bit for bit."""
    stepper, ids = make(name, packed), tokenizer.encode(TEXT)
    start, noise = 20, torch.Generator().manual_seed(0)
    cache = packed.new_cache(64)
    packed.prefill(ids[:start], cache)

    def logits_and_keys(rows: list[int], kept: int) -> tuple[Tensor, Tensor]:
        later = torch.arange(start, cache.capacity)[None]
        nothing = torch.zeros(1, later.shape[1], packed.config.num_kv_heads, packed.config.head_dim)
        for layer in range(packed.config.num_layers):
            cache.write(layer, later, nothing, nothing)
        out = run(stepper, rows, cache, start)[:kept]
        return out, torch.stack(tiny.cached(cache, start + kept, start))

    for kept in (1, 4):
        wanted, keys = logits_and_keys(ids[start : start + kept], kept)
        for count in (5, 8, stepper.max_rows) if name == "fused" else (8,):
            others = torch.randint(0, 49152, (count - kept,), generator=noise).tolist()
            rows, written = logits_and_keys([*ids[start : start + kept], *others], kept)
            assert torch.equal(rows, wanted) and torch.equal(written, keys)


@pytest.mark.parametrize(("weight_format", "share"), [("int4", 1.25), ("int8", 2.0)])
@torch.inference_mode()
def test_rounding_inputs_costs_little(
    exact: Decoder, default_model_path: Path, tokenizer: Tokenizer, weight_format: str, share: float
) -> None:
    """The fused kernels round activations to 8 bits: the text must not become less likely for it. Beside what 4-bit
    weights change it hardly shows; with 8-bit weights both are small, and about the same."""
    text = "\n".join(prompt.turns[0] for prompt in load_prompts(suite_path("koala"), 12))
    ids = tokenizer.encode(text)[:512]
    packed = load_decoder(default_model_path, weight_format)

    def logits(name: str, decoder: Decoder) -> Tensor:
        stepper, cache = make(name, decoder), decoder.new_cache(512)
        rows = range(0, len(ids), 64)
        return torch.cat([run(stepper, ids[at : at + 64], cache, at) for at in rows]).log_softmax(-1)

    def loss(scores: Tensor) -> float:
        return float(F.nll_loss(scores[:-1], torch.tensor(ids[1:])))

    def divergence(scores: Tensor) -> float:
        return float(F.kl_div(scores, wanted, reduction="batchmean", log_target=True))

    wanted, whole, rounded = logits("torch", exact), logits("torch", packed), logits("fused", packed)
    assert loss(rounded) < 1.01 * loss(whole)
    assert divergence(rounded) < share * divergence(whole)


@torch.inference_mode()
def test_int4_text_is_verified_as_it_was_decoded(packed: Decoder, tokenizer: Tokenizer) -> None:
    """An answer decoded token by token is the model's choice again when read in batches of any size."""
    stepper, prompt = make("fused", packed), tokenizer.encode(PROMPT)
    cache = packed.new_cache(16)
    packed.prefill(prompt[:-1], cache)
    sequence = TokenSequence(list(prompt), cache, Sampler(SamplingParams()), len(prompt))
    method = PlainDecoding(stepper)
    method.start(sequence)
    for _ in range(48):
        method.step(1)
    plain = [part.clone() for part in tiny.cached(cache, cache.length)]
    for size in (*range(2, 18), stepper.max_rows):
        cache.length = at = len(prompt) - 1
        while at < len(sequence.ids) - 1:
            rows = sequence.ids[at : min(at + size, len(sequence.ids) - 1)]
            chosen = run(stepper, rows, cache, at).argmax(-1).tolist()
            assert chosen == sequence.ids[at + 1 : at + 1 + len(rows)]
            cache.length = at = at + len(rows)
        again = tiny.cached(cache, cache.length)
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
