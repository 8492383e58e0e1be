"""Tokenizers from GGUF metadata: byte-level BPE and SentencePiece BPE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.chat_template import ChatTemplate
from engine.errors import ModelFileError, UnsupportedModelError
from engine.models.gguf_header import read_header
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

# Token types, as ggml numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> the regexes that cut the text one after the other; "digits" isolates each digit.
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), ("digits", _GPT2)),
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "phi-2", "jina-es", "jina-de", "trillion"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    # llama.cpp's rule for files that name none
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken", "falcon3")  # ignore_merges


def tokenizer_from_gguf(path: Path) -> Tokenizer:
    """The tokenizer that a ``.gguf`` file describes.

    Raises:
        ModelFileError: the file is damaged or holds no vocabulary.
        UnsupportedModelError: the tokenizer is of an unknown kind.
    """
    return tokenizer_from_metadata(read_header(path).metadata, path.name)


def tokenizer_from_metadata(meta: dict[str, Any], name: str) -> Tokenizer:
    """As :func:`tokenizer_from_gguf`, from the metadata; ``name`` is for messages."""
    tokens = meta.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelFileError(f"{name} holds no vocabulary; choose another file of this model.")
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(meta, tokens, name)
    elif kind == "llama":
        backend = _sentencepiece(meta, tokens)
    else:
        raise UnsupportedModelError(f"{name} uses a {kind} tokenizer, which is not known here.")
    _add_special(backend, meta, tokens, kind == "gpt2")

    def token(role: str) -> int | None:
        index = meta.get(f"tokenizer.ggml.{role}_token_id")
        return int(index) if index is not None and 0 <= index < len(tokens) else None

    bos, eos = token("bos"), token("eos")
    # llama.cpp's default where the file does not say: SentencePiece and Llama 3 begin with BOS.
    pre = meta.get("tokenizer.ggml.pre", "default")
    wants_bos = bool(meta.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _WHOLE_WORDS_FIRST))
    names = {f"{role}_token": tokens[i] for role, i in (("bos", bos), ("eos", eos)) if i is not None}
    ends = [i for i in (eos, token("eot"), token("eom")) if i is not None]
    template = ChatTemplate(meta.get("tokenizer.chat_template"), names)
    return Tokenizer(backend, template, ends, bos if wants_bos else None, chat_needs_bos=wants_bos)


def _byte_level(meta: dict[str, Any], tokens: list[str], name: str) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedModelError(f"{name} splits text by the rule {pre!r}, which is not known here.")
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    except Exception as error:  # a merge of unknown tokens; the library raises bare Exception
        raise ModelFileError(f"The vocabulary of {name} is damaged; download it again.") from error
    backend = tokenizers.Tokenizer(model)
    if _PRE_TOKENIZERS[pre] == (_QWEN2,):
        backend.normalizer = normalizers.NFC()
    cuts: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True) if cut == "digits"
        else pre_tokenizers.Split(Regex(cut), behavior="isolated")
        for cut in _PRE_TOKENIZERS[pre]
    ]  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(meta: dict[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = int(meta.get("tokenizer.ggml.unknown_token_id", 0))
    merges = _merges_from_scores(vocab, [float(s) for s in meta["tokenizer.ggml.scores"]], meta)
    model = models.BPE(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", "\u2581")
    prefixed = meta.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefixed else spaces
    steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend


def _merges_from_scores(
    vocab: dict[str, int], scores: list[float], meta: dict[str, Any]
) -> list[tuple[str, str]]:
    """SentencePiece's greedy rule as a merge list: join the pair whose result has the highest score."""
    types = meta.get("tokenizer.ggml.token_type")
    found = []
    for token, index in vocab.items():
        if types is not None and int(types[index]) != _NORMAL:
            continue
        local = [
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        ]
        local.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(scores[index], len(left), len(right), left, right) for left, right in local]
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in found]


def _add_special(
    backend: tokenizers.Tokenizer, meta: dict[str, Any], tokens: list[str], byte_level: bool
) -> None:
    from tokenizers import AddedToken

    types = meta.get("tokenizer.ggml.token_type")
    if types is None:
        return
    special = (_CONTROL,) if byte_level else (_CONTROL, _UNKNOWN)
    typed = list(zip(tokens, types, strict=False))
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in typed if k in special]
    )
    backend.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t, k in typed if k == _USER_DEFINED]
    )
