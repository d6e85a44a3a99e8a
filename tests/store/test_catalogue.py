"""A name becomes a file: the catalogue, names, and the store, filled from a stand-in server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from stand_in_hub import StandIn, answer, cut_after, drip
from stand_in_store import add_rows, code_of, leftovers, server, store  # noqa: F401

import edgellm.store.catalogue as catalogue_module
from edgellm.formats.errors import DownloadError, EdgeLLMError, ModelNotFoundError
from edgellm.models import architectures
from edgellm.store import DEFAULT_MODEL
from edgellm.store.catalogue import catalogue, fetched, installed, installed_models, pull, remove
from edgellm.store.sources import SOURCES
from edgellm.store.sources.hub import parse
from edgellm.store.sources.source import check_name, path_in

# --- the catalogue itself ------------------------------------------------------------------------------------


def test_every_shipped_row_has_a_known_source_and_says_what_it_is() -> None:
    rows = catalogue()
    assert DEFAULT_MODEL in rows
    for row in rows.values():
        assert all(one.partition(":")[0] in SOURCES for one in row.source)
        assert row.description and row.architecture in architectures() and row.licence
        assert SOURCES[row.source[0].partition(":")[0]].installed(row.source, Path("store")) is None


def test_shipped_rows_of_a_hub_name_one_file_or_one_quant() -> None:
    hub = {name: row.source for name, row in catalogue().items() if row.source[0].startswith("hf:")}
    assert hub
    for name, (reference,) in hub.items():
        _, file, tag = parse(reference.removeprefix("hf:"))
        assert (file is None) != (tag is None), name
    assert len(set(hub.values())) == len(hub)


def test_shipped_rows_of_package_indexes_know_their_checksum() -> None:
    for row in catalogue().values():
        if row.source[0].startswith("pypi:"):
            assert row.sha256 and row.nbytes


def test_the_users_own_rows_are_added_and_win(tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"GGUF")
    add_rows(f'[smollm2]\nsource = "path:{mine.as_posix()}"\n["own.1"]\nsource = "hf:a/b"\ndescription = "mine"\n')
    assert installed("smollm2") == mine
    assert catalogue()["own.1"].description == "mine"
    assert "gemma3-270m" in catalogue()


@pytest.mark.parametrize(
    "text",
    [
        "[m]\n",
        '[m]\nsource = "nowhere:x"\n',
        "[m]\nsource = 3\n",
        "[m]\nsource = []\n",
        '[m]\nsource = "hf:a/b"\nsha256 = "abc"\n',
        '[m]\nsource = "hf:a/b"\nsha256 = 5\n',
        '[m]\nsource = "hf:a/b"\nsize = "big"\n',
        '[m]\nsource = "hf:a/b"\nsize = -1\n',
        '[m]\nsource = "hf:a/b"\nlicence = 1\n',
        '["../m"]\nsource = "hf:a/b"\n',
        "m = 1\n",
        "[m\n",
        '[m]\nsource = "hf:a/b"\nsource = "hf:a/c"\n',
        '[m]\nsource = "hf:a/b"\nsize = true\n',
        '[m]\nsource = "hf:a/b"\nsize = nan\n',
        '[m]\nsource = "hf:a/b"\nsize = 1e9\n',
        f'[m]\nsource = "hf:a/b"\nsize = {10**18}\n',
        '[m]\nsource = "hf:a/b"\nsha265 = "abc"\n',
        '[m]\nsource = "m"\n',
        '[m]\nsource = "https://huggingface.co/datasets/a/b"\n',
        '[m]\nsource = ["hf:a/b", "hf:a/c"]\n',
        '[m]\nsource = {a = "hf:a/b"}\n',
        '[m.n]\nsource = "hf:a/b"\n',
        '["m.gguf"]\nsource = "hf:a/b"\n',
        '["m\\u001b[31m"]\nsource = "hf:a/b"\n',
        '[""]\nsource = "hf:a/b"\n',
        '[[m]]\nsource = "hf:a/b"\n',
    ],
)
def test_a_row_that_is_not_one_is_a_named_error_with_its_line(text: str) -> None:
    add_rows("# mine\n\n" + text)
    with pytest.raises(EdgeLLMError) as raised:
        catalogue()
    assert raised.value.code == "CATALOGUE"
    assert "models.toml" in str(raised.value)
    assert re.search("line [345]", str(raised.value)) or "\\u" in text, raised.value


@pytest.mark.parametrize(
    "data",
    [
        b"[m]\nsource = '\xff'\n",
        b"x = " + b"[" * 5000,
        b"[m]\nsize = " + b"9" * 5000,
        b"# " + b"x" * (2 << 20),
        b"\0",
    ],
)
def test_a_file_that_is_no_toml_is_a_named_error(data: bytes) -> None:
    add_rows("")
    path = Path(os.environ["EDGELLM_HOME"]) / "config" / "models.toml"
    path.write_bytes(data)
    with pytest.raises(EdgeLLMError, match=r"models\.toml") as raised:
        catalogue()
    assert raised.value.code == "CATALOGUE"
    path.unlink()
    path.mkdir()
    with pytest.raises(EdgeLLMError, match=r"models\.toml: it is a directory"):
        catalogue()


def test_a_row_may_hold_a_pasted_address_and_a_mark_at_its_head() -> None:
    add_rows('\ufeff[own]\nsource = "https://huggingface.co/a/b/blob/main/m.gguf"\n')
    assert catalogue()["own"].source == ("hf:a/b/m.gguf",)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("ftp://host/m.gguf", "from ftp:"), ("owner/repo", "hf:owner/repo"), ("a/b:Q8_0", "hf:a/b:Q8_0")],
)
def test_what_looks_like_an_address_is_told_how_to_write_it(name: str, advice: str) -> None:
    with pytest.raises(EdgeLLMError, match=advice) as raised:
        pull(name)
    assert raised.value.code == "MODEL_NOT_FOUND"


# --- names ---------------------------------------------------------------------------------------------------


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert fetched("smollm2") == Path("smollm2")
    assert fetched(tmp_path / "smollm2") == tmp_path / "smollm2"


@pytest.mark.parametrize(
    ("name", "hint"), [("smollm", "smollm2"), ("no/such.gguf", "no such file"), ("zzz", "smollm2")]
)
def test_an_unknown_name_says_what_is_meant(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFoundError, match=hint):
        fetched(name)


HOSTILE = [
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "/etc",
    "CON",
    "con.gguf",
    "NUL",
    "com1.txt",
    "a\0b",
    "a ",
    " a",
    "a .gguf ",
    "CON .gguf",
    "a:b",
    "é",
    "x" * 201,
    "a.",
]


@pytest.mark.parametrize("name", [*HOSTILE, "a..b", "-rf", ".hidden", "a\n", "$HOME", "~"])
def test_hostile_file_names_are_refused(name: str) -> None:
    with pytest.raises(DownloadError) as raised:
        check_name(name)
    assert raised.value.code == "PULL_NAME"


@pytest.mark.parametrize(
    "name",
    [
        "hf:../../etc/passwd.gguf",
        "hf:owner",
        "hf:owner/repo/file.bin",
        "hf:owner/../x.gguf",
        "hf:owner/repo/a/CON.gguf",
        "hf:owner/repo/x.gguf:Q4_K_M",
        "hf:/etc/passwd.gguf",
        "https://127.0.0.1/../x.gguf",
        "https://127.0.0.1/%2e%2e/%2e%2e/x.gguf",
        "https://127.0.0.1/a%2f..%2fx.gguf",
        "https://127.0.0.1/x.html",
        "pypi:a==1/../x.gguf",
        "pypi:a/x.gguf",
        "pypi:a==1//etc/x.gguf",
    ],
)
def test_hostile_references_are_refused_before_any_request(name: str) -> None:
    assert code_of(name) == "PULL_NAME"


def test_a_link_out_of_the_store_is_refused(store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    store.mkdir(parents=True)
    try:
        (store / "hf").symlink_to(outside)
    except OSError:
        pytest.skip("this system cannot make links")
    with pytest.raises(DownloadError) as raised:
        path_in(store, "hf", "model.gguf")
    assert raised.value.code == "PULL_NAME"


# --- https ---------------------------------------------------------------------------------------------------


def test_a_model_of_a_web_server_is_pulled_listed_found_and_removed(server: StandIn, store: Path) -> None:
    url = server.serve("/models/tiny.gguf", tiny_gguf())
    path = pull(url)
    assert path.read_bytes() == tiny_gguf()
    assert [(model.name, model.nbytes) for model in installed_models()] == [(url, len(tiny_gguf()))]
    assert installed(url) == path
    assert remove(url) == len(tiny_gguf())
    assert installed_models() == []
    assert list(store.rglob("*.gguf")) == []
    with pytest.raises(ModelNotFoundError):
        remove(url)


def test_a_model_that_is_here_needs_no_network(server: StandIn) -> None:
    url = server.serve("/tiny.gguf", tiny_gguf())
    path = pull(url)
    server.requests.clear()
    assert pull(url) == fetched(url) == path
    assert server.requests == []


def test_without_a_checksum_the_file_is_validated_before_it_gets_its_name(server: StandIn, store: Path) -> None:
    assert code_of(server.serve("/tiny.gguf", tiny_gguf()[:-40])) == "PULL_CONTENT"
    assert list(store.rglob("*.gguf")) == []


def tiny_gguf() -> bytes:
    """A GGUF file of one F32 tensor, made by hand."""

    def text(value: str) -> bytes:
        return len(value).to_bytes(8, "little") + value.encode()

    def u32(value: int) -> bytes:
        return value.to_bytes(4, "little")

    def u64(value: int) -> bytes:
        return value.to_bytes(8, "little")

    head = b"GGUF" + u32(3) + u64(1) + u64(1) + text("general.architecture") + u32(8) + text("llama")
    head += text("token_embd.weight") + u32(2) + u64(32) + u64(4) + u32(0) + u64(0)
    return head + bytes(-len(head) % 32) + bytes(32 * 4 * 4)


def test_one_pulls_and_the_others_wait_for_it(server: StandIn) -> None:
    url = server.serve("/tiny.gguf", tiny_gguf(), drip(64, 0.02))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and len(set(found)) == 1
    assert len(server.asked("/tiny.gguf")) == 1


def test_two_processes_pull_one_model_once(server: StandIn, store: Path) -> None:
    url = server.serve("/tiny.gguf", tiny_gguf(), drip(64, 0.02))
    command = [sys.executable, "-c", f"from edgellm.store.catalogue import pull; print(pull({url!r}))"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=60)[0] for child in children]
    assert said[0] == said[1] != ""
    assert len(server.asked("/tiny.gguf")) == 1
    assert leftovers(store) == []


def test_a_lock_of_a_dead_process_holds_nobody_up(server: StandIn, store: Path) -> None:
    url = server.serve("/tiny.gguf", tiny_gguf())
    references = catalogue_module.references_of(url)
    lock = store / ".incoming" / f"{catalogue_module._work_name(references)}.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("999999")
    assert pull(url).is_file()


def test_removing_takes_an_unfinished_pull_along(server: StandIn, store: Path) -> None:
    url = server.serve("/tiny.gguf", tiny_gguf(), cut_after(200), *(answer(500),) * 9)
    assert code_of(url) == "PULL_SERVER"
    assert len(leftovers(store)) == 2
    assert remove(url) >= 200
    assert leftovers(store) == []
