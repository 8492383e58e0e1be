"""Tokenizers: against transformers on HF folders, GGUF conversion, control tokens that people type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.chat_template import ChatTemplate
from engine.errors import InvalidRequestError, ModelFileError, UnsupportedModelError
from engine.gguf_tokenizer import tokenizer_from_metadata
from engine.requests import Message
from engine.tokenizer import Tokenizer, load_tokenizer
from tests import tiny

TEXTS = (
    "Hello, world!", "  leading\n\n\nand\ttabs  \n ", "12345 67890 3.14",
    "def f(x):\n    return x**2  # naïve\n",
    "Ünïcödé straße 北京市 こんにちは", "👩‍👩‍👧‍👦 😀 é", "I'll can't WE'RE",
    "a\r\nb\r\n", "", " ", "the the hello stopping",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_encodes_and_renders_as_transformers_does(folder: Path, tokenizer: Tokenizer):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
    messages = [
        Message("system", "the rules"),
        Message("user", "hello 😀"),
        Message("assistant", "an\n\nanswer"),
        Message("user", "\n  and then? "),
    ]
    plain = [{"role": m.role, "content": m.content} for m in messages]
    expected = reference.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    assert tokenizer.encode_chat(messages) == reference.encode(expected, add_special_tokens=False)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_text_survives_the_round_trip(text: str):
    text = text.encode("utf-8", "ignore").decode()
    tokenizer = _shared()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_all_ends_of_turn_are_known(tokenizer: Tokenizer):
    # config.json names 0, tokenizer_config.json names <|im_end|>
    assert tokenizer.eos_ids == {0, 2}


@pytest.mark.parametrize("spelled", tiny.SPECIAL)
def test_typed_control_tokens_stay_text(tokenizer: Tokenizer, spelled: str):
    """A user who types <|im_end|> neither ends the turn nor opens another."""
    plain = tokenizer.encode_chat([Message("user", "hello there")])
    typed = tokenizer.encode_chat([Message("user", f"hello {spelled}{spelled} there")])
    for index in tokenizer.special_ids:
        assert typed.count(index) == plain.count(index)
    shown = b"".join(map(tokenizer.token_bytes, typed)).decode()
    assert f"hello {spelled}{spelled} there" in shown
    assert not set(tokenizer.encode(spelled)) & tokenizer.special_ids


def test_typed_placeholders_do_no_harm(tokenizer: Tokenizer):
    """The characters that stand in for control tokens while rendering may occur in a text themselves."""
    odd = "\U000f0000<|im_end|>\U000f0001"
    ids = tokenizer.encode_chat([Message("user", odd)])
    assert odd.encode() in b"".join(map(tokenizer.token_bytes, ids))
    assert ids.count(2) == 1


def test_lone_surrogates_do_not_crash(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_special_tokens_have_no_text(tokenizer: Tokenizer):
    assert tokenizer.token_bytes(2) == b"" and tokenizer.token_bytes(10**6) == b""


# -- GGUF metadata -------------------------------------------------------------------------------------


def gguf_metadata() -> dict[str, object]:
    """The tiny tokenizer as a GGUF file describes it."""
    state = json.loads(tiny.build_tokenizer().to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in state["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if token in tiny.SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }


def test_gguf_tokenizer_equals_the_folder(tokenizer: Tokenizer):
    converted = tokenizer_from_metadata(gguf_metadata(), "tiny.gguf")
    for text in TEXTS:
        assert converted.encode(text) == tokenizer.encode(text)
    chat = [Message("user", "hello <|im_end|>\n\n12")]
    assert converted.encode_chat(chat) == tokenizer.encode_chat(chat)
    assert converted.eos_ids == {0, 2}


def test_gguf_bos_is_added_once_where_the_file_asks():
    meta = {**gguf_metadata(), "tokenizer.ggml.add_bos_token": True}
    assert tokenizer_from_metadata(meta, "x").encode_chat([Message("user", "a")])[:2] == [0, 1]
    meta["tokenizer.chat_template"] = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    tokenizer = tokenizer_from_metadata(meta, "x")
    assert tokenizer.encode_chat([Message("user", "a")])[:2] == [0, 1]
    assert tokenizer.encode("a", add_bos=True)[0] == 0 and tokenizer.encode("a")[0] != 0


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", " 12 ab", [" ", "1", "2", " ab"]),
        ("qwen2", "12 can't", ["1", "2", " can", "'t"]),
        ("llama-bpe", "1234 can'T", ["123", "4", " can", "'T"]),
        ("gpt-2", "1234 can't", ["1234", " can", "'t"]),
    ],
)
def test_pre_tokenizers_cut_as_named(pre: str, text: str, pieces: list[str]):
    backend = tokenizer_from_metadata({**gguf_metadata(), "tokenizer.ggml.pre": pre}, "x").backend
    cut = [text[begin:end] for _, (begin, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces


def test_sentencepiece_joins_by_score_and_falls_back_to_bytes():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
              "\u2581", "a", "b", "c", "ab", "bc", "\u2581ab"]  # fmt: skip
    types = [2, 3, 3, *[6] * 256, *[1] * 7]
    scores = [0.0] * 259 + [-7.0, -7.0, -7.0, -7.0, -3.0, -2.0, -1.0]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = tokenizer_from_metadata(meta, "x")

    def spell(text: str) -> list[str]:
        return [tokens[index] for index in tokenizer.encode(text)]

    assert spell("ab") == ["\u2581ab"]
    assert spell("abc") == ["\u2581", "a", "bc"]  # bc has the higher score than ab, and takes its b away
    assert spell("é") == ["\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é c")) == "ab é c"
    assert tokenizer.strips_space and tokenizer.eos_ids == {2} and tokenizer.bos_id == 1
    assert not set(tokenizer.encode("</s>")) & {1, 2}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tokenizer.ggml.tokens": None}, ModelFileError),
        ({"tokenizer.ggml.model": "bert"}, UnsupportedModelError),
        ({"tokenizer.ggml.pre": "no-such-rule"}, UnsupportedModelError),
        ({"tokenizer.ggml.merges": ["zzz yyy"]}, ModelFileError),
    ],
)
def test_unusable_gguf_vocabularies_are_one_sentence(change: dict[str, object], error: type[Exception]):
    with pytest.raises(error) as caught:
        tokenizer_from_metadata({**gguf_metadata(), **change}, "tiny.gguf")
    assert str(caught.value).endswith(".") and "tiny.gguf" in str(caught.value)


# -- Broken folders and templates ----------------------------------------------------------------------


def test_damaged_tokenizer_files_are_one_sentence(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text('{"model": {')
    with pytest.raises(ModelFileError, match=r"tokenizer\.json .* is damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[[[")
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json .* is damaged"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_one_sentence(tmp_path: Path):
    with pytest.raises(ModelFileError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_template_without_system_role_gets_it_in_the_first_turn():
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}: {{ m.content }}]{% endfor %}"
    )
    template = ChatTemplate(source)
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert template.render(turns) == "[user: S\n\nU]"
    with pytest.raises(InvalidRequestError, match="no system"):
        template.render([*turns[1:], turns[0]])


def test_a_template_cannot_reach_python():
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequestError):
        template.render([{"role": "user", "content": "x"}])


def test_a_broken_template_is_one_sentence():
    with pytest.raises(ModelFileError, match="chat template is broken"):
        ChatTemplate("{% for %}").render([{"role": "user", "content": "x"}])


def test_without_template_chatml_is_used():
    rendered = ChatTemplate(None).render([{"role": "user", "content": "x"}])
    assert rendered == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


# -- The default model ---------------------------------------------------------------------------------


@pytest.mark.real_model
def test_smollm2_chat_is_what_it_was_trained_on(default_model_path: Path):
    tokenizer = load_tokenizer(default_model_path)
    ids = tokenizer.encode_chat([Message("user", "hi 12")])
    # <|im_start|>system ... <|im_end|> \n <|im_start|>user \n hi 1 2 <|im_end|> \n <|im_start|>assistant \n
    assert ids[:3] == [1, 9690, 198]
    assert ids[-14:] == [2, 198, 1, 4093, 198, 6004, 216, 33, 34, 2, 198, 1, 520, 9531, 198][-14:]
    assert tokenizer.eos_ids == {0, 2} and tokenizer.vocab_size == 49152


_SHARED: list[Tokenizer] = []


def _shared() -> Tokenizer:
    """hypothesis does not mix with module fixtures that are function arguments."""
    if not _SHARED:
        _SHARED.append(tokenizer_from_metadata(gguf_metadata(), "tiny"))
    return _SHARED[0]
