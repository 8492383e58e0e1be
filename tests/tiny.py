"""Tiny random models, saved as HF folders: deterministic, built in milliseconds, no download.

They have a byte-level tokenizer of a little over 300 tokens and a ChatML template, so everything that a
real chat does works on them; only the answers make no sense.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MOE_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT_LENGTH = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A few merges, so that tokens span several bytes, and one token ends inside a UTF-8 character.
_MERGES = (
    ("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("o", "n"), ("Ġ", "the"), ("Ġ", "a"),
    ("l", "l"), ("h", "e"), ("he", "ll"), ("hell", "o"), ("1", "2"), ("Ã", "¤"), ("ð", "Ł"), ("Ġ", "ð"),
    ("s", "t"), ("st", "o"), ("sto", "p"), ("Ċ", "Ċ"), ("in", "g"), ("an", "d"), ("r", "e"), ("o", "r"),
)  # fmt: skip


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def build_tokenizer() -> Any:
    """A byte-level BPE ``tokenizers.Tokenizer``: 3 special tokens, 256 bytes, the merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIAL, *byte_alphabet(), *("".join(pair) for pair in _MERGES)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def vocab_size() -> int:
    """Rows of the tiny models' embedding: the tokenizer's size, rounded up to a multiple of 32."""
    return -(-(len(SPECIAL) + 256 + len(_MERGES)) // 32) * 32


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def hf_config(family: str = "llama", **changes: Any) -> Any:
    """The transformers config of a tiny model of ``family``; ``changes`` override fields."""
    from transformers import AutoConfig

    fields: dict[str, Any] = {
        "vocab_size": vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": family not in ("mistral", "mixtral", "olmoe"),
        "initializer_range": 0.1,  # the default 0.02 makes all logits alike
    }
    if family == "mistral":
        fields["sliding_window"] = 48
        fields["head_dim"] = 16
    if family in ("qwen3", "qwen3_moe"):
        fields["head_dim"] = 32
    if family in MOE_FAMILIES:
        count = "num_local_experts" if family in ("mixtral", "granitemoe") else "num_experts"
        fields |= {count: 8, "num_experts_per_tok": 3}
    if family in ("qwen2_moe", "qwen3_moe"):
        fields |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}
    if family == "granitemoe":
        fields |= {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4,
            "logits_scaling": 5.0,
        }  # fmt: skip
    return AutoConfig.for_model(family, **{**fields, **changes})


def build_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random transformers model in float32, evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config(family, **changes), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # The usual ones and zeros would hide mistakes.
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return model.eval()


def save_model(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model with its tokenizer as an HF folder (config.json, model.safetensors); returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    build_model(family, seed, **changes).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_prompts(path: Path, count: int = 60) -> Path:
    """Write ``count`` short prompts to ``path`` (JSON Lines); returns it."""
    choose = random.Random(0)
    words = ("the", "hello", "stop", "and", "ring", "on", "in", "an", "or", "he", "ll", "12")
    lines = [json.dumps({"turns": [" ".join(choose.choices(words, k=3))]}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def cached(cache: Any, end: int, first: int = 0) -> list[Any]:
    """What slots ``first .. end - 1`` of a key/value cache hold: of each layer keys and values ``[B, Hkv, slots, hd]``."""
    layers = (cache.read(layer, end) for layer in range(len(cache.keys)))
    return [part[:, :, first:] for layer in layers for part in layer]
