"""Text <-> token ids, from an HF folder or from GGUF metadata, without importing transformers.

**Control tokens in what people type.** ``<|im_end|>`` typed by a user (or said by the model in an
earlier turn) is text, never a control token: only the chat template may write control tokens. Message
contents are rendered with placeholders where they spell a special token, and those stretches are
encoded as ordinary characters. Chats without such text encode exactly as transformers encodes them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.chat_template import ChatTemplate
from engine.errors import ModelFileError
from engine.requests import Message

if TYPE_CHECKING:
    import tokenizers

# Tokens that end a turn in the families people run, whatever the model's files say about EOS.
_END_OF_TURN = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>",
    "<end_of_turn>", "<|return|>", "</s>",
)  # fmt: skip
_FIRST_PLACEHOLDER = 0xF0000  # a private-use plane: no font, no vocabulary and hardly any text uses it


class Tokenizer:
    """A ``tokenizers`` tokenizer with the model's chat template and end-of-sequence tokens.

    Attributes:
        backend: the underlying ``tokenizers.Tokenizer``.
        eos_ids: every token that ends an answer.
        bos_id: the beginning-of-sequence token that raw prompts start with, if the model wants one.
        strips_space: SentencePiece style: a decoded text loses its first space.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: ChatTemplate,
        eos_ids: Sequence[int] = (),
        bos_id: int | None = None,
        chat_needs_bos: bool = False,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self._template = template
        self._chat_needs_bos = chat_needs_bos
        self._lock = threading.Lock()  # encode_special_tokens is a switch on the shared backend
        added = backend.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        special_texts = {self._added[index]: index for index in self.special_ids}
        self._special_texts = sorted(special_texts, key=len, reverse=True)
        known = [special_texts[text] for text in _END_OF_TURN if text in special_texts]
        self.eos_ids = frozenset((*eos_ids, *known))
        kinds = _decoder_kinds(backend)
        self._byte_level = "ByteLevel" in kinds
        self.strips_space = "Strip" in kinds or "Metaspace" in kinds

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def uses_default_template(self) -> bool:
        """The model brings no chat template of its own."""
        return self._template.is_default

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of ``text`` taken literally: spelled special tokens stay ordinary characters."""
        ids = self._encode(text, literal=True)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a chat through the model's template, ready for the model's answer.

        Raises:
            InvalidRequestError: the template refuses this order of roles.
        """
        contents, literals = self._shield([message.content for message in messages])
        turns = [{"role": m.role, "content": c} for m, c in zip(messages, contents, strict=True)]
        rendered = self._template.render(turns, add_generation_prompt)
        ids: list[int] = []
        for text, literal in _split(rendered, literals):
            ids.extend(self._encode(text, literal))
        if self._chat_needs_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        text = b"".join(self.token_bytes(index) for index in ids).decode("utf-8", errors="replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that one token stands for; empty for special and unknown ids."""
        known = self._bytes.get(index)
        if known is None:
            known = self._bytes[index] = self._spell(index)
        return known

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {}

    def _spell(self, index: int) -> bytes:
        if index in self.special_ids:
            return b""
        if index in self._added:
            return self._added[index].encode()
        token = self.backend.id_to_token(index)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF[char] for char in token if char in _BYTE_OF)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes((int(token[3:5], 16),))
        return token.replace("\u2581", " ").encode()

    def _encode(self, text: str, literal: bool) -> list[int]:
        if not text:
            return []
        text = text.encode("utf-8", errors="replace").decode()  # lone surrogates cannot be tokenized
        with self._lock:
            self.backend.encode_special_tokens = literal
            return self.backend.encode(text, add_special_tokens=False).ids

    def _shield(self, contents: list[str]) -> tuple[list[str], dict[str, str]]:
        """Replace spelled special tokens in ``contents`` by one-character placeholders."""
        everything = "".join(contents)
        literals: dict[str, str] = {}
        code = _FIRST_PLACEHOLDER
        for text in self._special_texts:
            if text not in everything:
                continue
            while chr(code) in everything:
                code += 1
            literals[chr(code)] = text
            contents = [content.replace(text, chr(code)) for content in contents]
            code += 1
        return contents, literals


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the model at ``path``: a ``.gguf`` file, an HF folder, or a recipe's folder.

    Raises:
        ModelFileError: it is missing or damaged.
        UnsupportedModelError: a GGUF tokenizer of a kind that is not known here.
    """
    from engine.models.split_checkpoint import base_of, is_recipe

    if is_recipe(path):
        return load_tokenizer(base_of(path))
    if path.is_dir():
        return _from_folder(path)
    from engine.gguf_tokenizer import tokenizer_from_gguf

    return tokenizer_from_gguf(path)


def _from_folder(folder: Path) -> Tokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    settings = _read_json(folder / "tokenizer_config.json")
    if file.exists():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelFileError(f"{file.name} of {folder.name} is damaged; download it again.") from error
        backend.no_truncation()
        backend.no_padding()
    else:
        backend = _through_transformers(folder)
    eos_ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        eos_ids.extend(value if isinstance(value, list) else [] if value is None else [value])
    names = _special_names(settings)
    if (eos := backend.token_to_id(names.get("eos_token", ""))) is not None:
        eos_ids.append(eos)
    # A raw prompt starts with what the tokenizer's own post-processor puts before an empty text.
    leading = backend.encode("", add_special_tokens=True).ids
    bos = leading[0] if leading and leading[0] not in eos_ids else None
    return Tokenizer(backend, ChatTemplate(_template_source(folder, settings), names), eos_ids, bos)


def _through_transformers(folder: Path) -> tokenizers.Tokenizer:
    """Slow path for folders with only a SentencePiece or vocabulary file."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # missing files and missing converters raise all sorts
        raise ModelFileError(f"{folder.name} holds no usable tokenizer; download it again.") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise ModelFileError(f"{file.name} of {file.parent.name} is damaged; download it again.") from error
    return value if isinstance(value, dict) else {}


def _special_names(settings: dict[str, Any]) -> dict[str, str]:
    names = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            names[key] = text
    return names


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default") or next(iter(named.values()), None)
    return source


def _split(rendered: str, literals: dict[str, str]) -> list[tuple[str, bool]]:
    """Cut at placeholders into (text, is literal) parts."""
    parts: list[tuple[str, bool]] = []
    begin = 0
    for at, char in enumerate(rendered):
        if char in literals:
            parts += [(rendered[begin:at], False), (literals[char], True)]
            begin = at + 1
    return [*parts, (rendered[begin:], False)]


def _decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    decoder = backend.decoder
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_alphabet()
