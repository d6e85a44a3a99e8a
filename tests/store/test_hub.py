"""A hub as people meet it: pasted addresses, tokens, terms, and the words of the hub in an error."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path

import pytest
from stand_in_hub import StandIn, answer
from stand_in_store import code_of, server, store  # noqa: F401  (fixtures)

from edgellm.formats.errors import DownloadError, ModelNotFoundError
from edgellm.store.catalogue import catalogue, installed, installed_models, pull, remove
from edgellm.store.sources.hub import choose, parse
from edgellm.store.sources.hub_address import reference_of
from edgellm.store.sources.source import split_names

BODY = b"GGUF" + random.Random(5).randbytes(20_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize(
    ("name", "is_model"),
    [
        ("m-imatrix-Q4_K_M.gguf", True),
        ("imatrix-quants/m-IQ3_XS.gguf", True),
        ("m.imatrix.i1-Q2_K.gguf", True),
        ("mmproject-Q4_0.gguf", True),
        ("imatrix.gguf", False),
        ("m-imatrix.gguf", False),
        ("imatrix_unsloth.gguf", False),
        ("m.imatrix.gguf", False),
        ("mmproj-m-f16.gguf", False),
        ("m-mmproj-Q8_0.gguf", False),
        ("mtp-m-Q4_0.gguf", False),  # drafts for it
        ("m-MTP-Q4_0.gguf", True),
    ],
)
def test_what_stands_beside_a_model_is_told_by_its_own_name(name: str, is_model: bool) -> None:
    assert (choose([name], None) == name) is is_model


LISTED = {"gpt-oss-20b": "gpt-oss-20b-mxfp4.gguf", "granite3.1-1b-a400m": "granite-3.1-1b-a400m-instruct-Q4_K_M.gguf"}
LISTED |= {"smollm3-3b": "HuggingFaceTB_SmolLM3-3B-Q4_K_M.gguf"}
LISTED |= {"phi4-mini-reasoning": "microsoft_Phi-4-mini-reasoning-Q4_K_M.gguf"}
LISTED |= {"qwen3-vl-4b": "Qwen3-VL-4B-Instruct-Q4_K_M.gguf"}
LISTED |= {"glm4.5-air": "Q4_K_M/GLM-4.5-Air-Q4_K_M-00001-of-00002.gguf"}
LISTED |= {"minimax-m2": "Q4_K_M/MiniMax-M2-Q4_K_M-00001-of-00003.gguf"}
"""Files of the rows that name a quant, as they were published."""


@pytest.mark.parametrize("name", [name for name, row in catalogue().items() if row.source[0].startswith("hf:")])
def test_a_name_of_the_catalogue_brings_its_model_and_nothing_that_stands_beside_it(
    name: str,
    server: StandIn,
    store: Path,
) -> None:
    repo, file, _ = parse(catalogue()[name].source[0].removeprefix("hf:"))
    wanted = file or LISTED[name]
    folder, _, last = wanted.rpartition("/")
    names = [f"mmproj-{last}", f"mtp-{last}", f"MTP/mtp-{last}", "imatrix.gguf", f"Old{last}"]
    beside = [f"{folder}/{one}" if folder else one for one in names]
    beside.append(re.sub("(?i)q4_k_m|q4_0|q8_0|mxfp4", "Q2_K", wanted))
    server.serve_repository(repo, dict.fromkeys(beside, b"GGUF other") | dict.fromkeys(split_names(wanted), BODY))
    path = pull(name)
    assert path.read_bytes() == BODY and path.name == last and installed(name) == path
    assert path.is_relative_to(store)


HUB = "https://huggingface.co/"
ADDRESSES = {
    HUB + "owner/repo": "hf:owner/repo",
    HUB + "owner/repo/": "hf:owner/repo",
    "  https://www.huggingface.co/owner/repo\n": "hf:owner/repo",
    "http://huggingface.co/owner/repo": "hf:owner/repo",
    "HTTPS://HuggingFace.co/owner/repo": "hf:owner/repo",
    "hf.co/owner/repo:Q8_0": "hf:owner/repo:Q8_0",
    "https://hf.co/owner/repo:Q8_0": "hf:owner/repo:Q8_0",
    "hf://owner/repo": "hf:owner/repo",
    "hf:owner/repo/": "hf:owner/repo",
    "HF:owner/repo": "hf:owner/repo",
    HUB + "owner/repo?library=x#readme": "hf:owner/repo",
    HUB + "owner/repo/tree/main": "hf:owner/repo",
    HUB + "owner/repo/tree/main/": "hf:owner/repo",
    HUB + "owner/repo/tree/main/m-Q8_0": "hf:owner/repo:m-Q8_0",
    HUB + "owner/repo/tree/main?show_file_info=m-Q8_0.gguf": "hf:owner/repo/m-Q8_0.gguf",
    HUB + "owner/repo/blob/main/m-Q8_0.gguf": "hf:owner/repo/m-Q8_0.gguf",
    HUB + "owner/repo/blob/main/my%20models/m.gguf#L1": "hf:owner/repo/my models/m.gguf",
    HUB + "owner/repo/resolve/main/m-Q8_0.gguf?download=true": "hf:owner/repo/m-Q8_0.gguf",
    HUB + "owner/repo/raw/main/m-Q8_0.gguf": "hf:owner/repo/m-Q8_0.gguf",
    HUB + "owner/repo/blob/main/config.json": "hf:owner/repo",
    HUB + "owner/repo/discussions/3": "hf:owner/repo",
    HUB + "api/models/owner/repo": "hf:owner/repo",
    HUB + "owner/repo/blob/v1/m.gguf": HUB + "owner/repo/resolve/v1/m.gguf",
    HUB + "owner/repo/resolve/refs%2Fpr%2F1/m.gguf": HUB + "owner/repo/resolve/refs%2Fpr%2F1/m.gguf",
    "https://elsewhere.org/owner/repo/blob/main/m.gguf": "https://elsewhere.org/owner/repo/blob/main/m.gguf",
    "https://hub.example/owner/repo/blob/main/m.gguf": "hf:owner/repo/m.gguf",
    "https://hub.example/files/m.gguf": "https://hub.example/files/m.gguf",
    "smollm2": "smollm2",
    "folder/model.gguf": "folder/model.gguf",
    "my models/model.gguf": "my models/model.gguf",
}


@pytest.mark.parametrize(("typed", "meant"), ADDRESSES.items(), ids=ADDRESSES)
def test_a_pasted_address_is_the_model_that_it_shows(typed: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    assert reference_of(typed) == meant
    assert reference_of(meant) == meant


@pytest.mark.parametrize("page", ["", "owner", "datasets/owner/data", "spaces/owner/space", "owner/repo/tree/v2"])
def test_an_address_that_shows_no_model_is_refused(page: str) -> None:
    with pytest.raises(DownloadError) as raised:
        reference_of(HUB + page)
    assert raised.value.code == "PULL_NAME"


@pytest.mark.parametrize("view", ["tree/main", "blob/main/m-Q4_0.gguf", "resolve/main/m-Q4_0.gguf?download=true#top"])
def test_a_pasted_address_is_pulled_found_and_removed(server: StandIn, view: str) -> None:
    server.serve_repository("owner/repo", {"m-Q4_0.gguf": BODY})
    address = f"{server.url}/owner/repo/{view}"
    path = pull(address)
    assert installed(address) == installed("hf:owner/repo") == path
    assert remove(address) == len(BODY)
    with pytest.raises(ModelNotFoundError, match="edgellm pull"):
        installed(address)


REFUSED = {"X_Error_Message": "Invalid credentials in Authorization header"}
GATED = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access to model owner/repo is restricted."}
DOORS = ("/api/models/owner/repo", "/owner/repo/resolve/c0ffee/m-Q4_0.gguf")


@pytest.mark.parametrize("path", DOORS)
def test_a_public_model_is_pulled_without_a_token_that_has_run_out(
    server: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    server.serve_repository("owner/repo", {"m-Q4_0.gguf": BODY})
    server.resources[path].faults = [answer(401, **REFUSED)]
    with pytest.warns(UserWarning, match=r"HF_TOKEN \(Invalid credentials.*is pulled without it") as said:
        assert pull("hf:owner/repo").read_bytes() == BODY
    assert len(said) == 1
    asked = [headers for where, headers in server.requests if where.startswith(path)]
    assert "Authorization" in asked[0] and "Authorization" not in asked[-1]


@pytest.mark.parametrize("token", ["hf_expired", ""])
@pytest.mark.parametrize("path", DOORS)
def test_a_model_with_terms_says_where_they_are(
    server: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    token: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    server.serve_repository("owner/repo", {"m-Q4_0.gguf": BODY})
    server.resources[path].faults = [answer(403, **GATED)] * 2
    with pytest.raises(DownloadError, match=f"restricted.*Accept them at {server.url}/owner/repo") as raised:
        pull("hf:owner/repo")
    assert raised.value.code == "PULL_AUTH" and "HF_TOKEN" in str(raised.value)


def test_a_token_that_is_accepted_nowhere_is_named_with_the_hubs_words(
    server: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    server.serve("/api/models/owner/repo", b"", *[answer(401, **REFUSED)] * 2)
    with pytest.raises(DownloadError, match=r"does not accept HF_TOKEN.*Invalid credentials"):
        pull("hf:owner/repo")


def test_a_token_that_can_be_none_is_not_sent(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_é")
    assert code_of("hf:owner/repo") == "PULL_AUTH"
    assert server.requests == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b'{"siblings": 3}',
        b'{"siblings": [3]}',
        b'{"siblings": [{"rfilename": 3}]}',
        b'{"siblings": [{"rfilename": "m.gguf", "size": "many"}]}',
        b'{"siblings": [{"rfilename": "m.gguf", "size": -1}]}',
        b'{"siblings": [{"rfilename": "m.gguf", "lfs": [1]}]}',
        b'{"siblings": [{"rfilename": "m.gguf", "lfs": {"sha256": "short"}}]}',
        b"[" * 100_000,
    ],
)
def test_a_list_that_is_none_is_an_error_of_the_hub(server: StandIn, text: bytes) -> None:
    server.serve("/api/models/owner/repo", text)
    assert code_of("hf:owner/repo") == "PULL_CONTENT"


def test_a_file_in_a_folder_with_a_blank_is_pulled_found_and_removed(server: StandIn) -> None:
    server.serve_repository("owner/repo", {"my models/m (v2).gguf": BODY})
    at = "/owner/repo/resolve/c0ffee/my models/m (v2).gguf"
    server.resources["/owner/repo/resolve/c0ffee/my%20models/m%20%28v2%29.gguf"] = server.resources.pop(at)
    path = pull("hf:owner/repo")
    assert path.read_bytes() == BODY
    (model,) = installed_models()
    assert installed(model.name) == installed("hf:owner/repo/my models/m (v2).gguf") == path
    assert remove(model.name) == len(BODY)
