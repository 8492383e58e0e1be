"""The quick header reader against the ``gguf`` package, and on damaged files."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.errors import ModelFileError, SlipstreamError
from engine.models.gguf_file import GgufFile
from engine.models.gguf_header import read_header


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "täst")
    writer.add_uint32("llama.block_count", 7)
    writer.add_float32("llama.eps", 0.5)
    writer.add_bool("flag", True)
    writer.add_int64("negative", -3)
    writer.add_array("words", ["a", "ü", ""])
    writer.add_array("numbers", [1, -2, 3])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.standard_normal((3, 64)).astype(np.float32))
    writer.add_tensor("half", rng.standard_normal(64).astype(np.float16))
    packed = gguf.quantize(rng.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_those_of_the_gguf_package(file: Path):
    header, reference = read_header(file), gguf.GGUFReader(file)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            value = header.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    for tensor in reference.tensors:
        entry = header.tensors[tensor.name]
        assert entry.shape == tuple(tensor.shape)
        assert (entry.type_id, entry.offset) == (tensor.tensor_type, tensor.data_offset)


def test_tensors_dequantize_as_the_gguf_package_does(file: Path):
    opened = GgufFile(file)
    for tensor in gguf.GGUFReader(file).tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(opened.dequantize(tensor.name).numpy(), expected.reshape(-1, 64).squeeze())


def test_a_file_cut_anywhere_is_one_sentence(file: Path, tmp_path: Path):
    whole = file.read_bytes()
    for size in range(0, len(whole) - 32, 37):  # 32: the padding behind the last tensor
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelFileError) as caught:
            GgufFile(cut)
        message = str(caught.value)
        assert "cut.gguf" in message and message.endswith(".") and "\n" not in message


def test_damaged_bytes_never_crash(file: Path, tmp_path: Path):
    """Whatever a broken header says, the outcome is a model file error or a readable header."""
    whole, generator = bytearray(file.read_bytes()), random.Random(0)
    end = min(entry.offset for entry in read_header(file).tensors.values())
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(4, end)] = generator.randrange(256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        with contextlib.suppress(SlipstreamError):
            GgufFile(path)


@pytest.mark.parametrize(("content", "message"), [(b"", "not a GGUF"), (b"GGML" + bytes(40), "not a GGUF")])
def test_a_wrong_magic_is_one_sentence(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        read_header(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path):
    with pytest.raises(ModelFileError, match="does not exist"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(tmp_path)
