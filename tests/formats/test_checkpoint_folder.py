"""The way to a checkpoint's files: none leads out of the folder, but for Hugging Face's cache into its own blobs."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from stand_in_hub import StandIn
from stand_in_store import server, store  # noqa: F401
from test_checkpoint_hostile import write

import edgellm.formats.checkpoint
import edgellm.quantize.checkpoint
from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.formats.errors import EdgeLLMError, FormatError
from edgellm.quantize.inputs import open_input

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"
# every file of the folder that is read, with what else must be there for it to be read
FILES: dict[str, dict[str, str]] = {
    "config.json": {},
    "generation_config.json": {},
    "tokenizer.json": {},
    "tokenizer_config.json": {},
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "tokenizer.model": {"tokenizer.json": ""},
    "vocab.json": {"tokenizer.json": ""},
    "merges.txt": {"tokenizer.json": "", "vocab.json": "{}"},
    "chat_template.jinja": {},
    "chat_template.json": {},
    "additional_chat_templates/tool.jinja": {"chat_template.jinja": "{{ messages }}"},
    "README.md": {},
    "model.safetensors": {},
    "model.safetensors.index.json": {"model.safetensors": ""},
}


def whole(folder: Path, others: dict[str, str]) -> Path:
    """A sound checkpoint with these files; an empty one is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)
    for name, text in others.items():
        (folder / name).write_text(text) if text else (folder / name).unlink()
    return folder


@pytest.mark.parametrize("target", ["file", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_is_refused_by_its_name(name: str, target: str, tmp_path: Path) -> None:
    secret = tmp_path / "id_ed25519"
    if target == "file":
        secret.write_text(SECRET)
    link = whole(tmp_path / "model", FILES[name]) / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(FormatError, match=link.name) as caught:
        open_input(tmp_path / "model")
    assert caught.value.code == "CHECKPOINT_LINK"
    assert SECRET not in str(caught.value)


def test_a_folder_of_templates_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "own.jinja").write_text(SECRET)
    folder = whole(tmp_path / "model", {"chat_template.jinja": "{{ messages }}"})
    (folder / "additional_chat_templates").symlink_to(tmp_path / "keys")
    with pytest.raises(FormatError, match="additional_chat_templates") as caught:
        open_input(folder)
    assert caught.value.code == "CHECKPOINT_LINK"


def snapshot(cache: Path, repository: str = "models--owner--name") -> Path:
    """A sound checkpoint as Hugging Face's client keeps it: links into the blobs of the repository."""
    files = whole(cache / "downloaded", {"chat_template.jinja": "{{ messages }}"})
    folder, blobs = cache / repository / "snapshots" / "0123abcd", cache / repository / "blobs"
    for made in (folder, blobs):
        made.mkdir(parents=True)
    for i, path in enumerate(sorted(files.iterdir())):
        path.rename(blobs / f"{i:064x}")
        (folder / path.name).symlink_to(f"../../blobs/{i:064x}")
    return folder


def test_the_cache_of_hugging_faces_client_is_read(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "hub")
    (tmp_path / "way").symlink_to(folder)
    for way in (folder, tmp_path / "way"):  # the user's own link to the folder is the user's
        with open_input(way) as source:
            assert source.metadata["tokenizer.chat_template"][0] == "{{ messages }}"


@pytest.mark.parametrize(
    "target", ["../../../models--other--name/blobs/aa", "../../blobs/../../aa", "../../blobs/sub/aa", "../../refs/aa",
               "../../blobs/link", "/etc/passwd", "config.json"]
)  # fmt: skip
def test_links_of_a_cache_lead_into_its_own_blobs_alone(target: str, tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "hub")
    for name in (
        "models--other--name/blobs/aa",
        "aa",
        "models--owner--name/blobs/sub/aa",
        "models--owner--name/refs/aa",
    ):
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SECRET)
    (folder.parent.parent / "blobs" / "link").symlink_to(tmp_path / "hub" / "aa")
    (folder / "README.md").symlink_to(target)
    with pytest.raises(FormatError, match=r"README\.md") as caught:
        open_input(folder)
    assert caught.value.code == "CHECKPOINT_LINK"


def test_pipes_directories_and_long_files_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "deep").mkdir()
    (tmp_path / "long").write_bytes(bytes(11))
    folder = CheckpointFolder(tmp_path)
    assert folder.read("deep", 10) is None
    assert folder.read("none", 10) is None
    assert folder.read("long", 11) == bytes(11)
    for name, code in (("pipe", "MODEL_NOT_A_FILE"), ("long", "CHECKPOINT_CONFIG"), ("../x", "CHECKPOINT_LINK")):
        with pytest.raises(EdgeLLMError) as caught:
            folder.read(name, 10)
        assert caught.value.code == code


def test_a_text_that_is_none_is_refused_and_not_repaired(tmp_path: Path) -> None:
    folder = whole(tmp_path / "model", {})
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(FormatError, match=r"chat_template\.jinja: byte 14"):
        open_input(folder)


def test_readers_of_a_checkpoint_have_no_other_way_to_a_file() -> None:
    """Outside the one class, no reader of a checkpoint opens, reads or looks for a file by a path."""
    formats = Path(edgellm.formats.checkpoint.__file__).parent
    package = Path(edgellm.quantize.checkpoint.__file__).parent.parent
    readers = [formats / "checkpoint.py", formats / "safetensors.py", *(formats / "checkpoints").glob("*.py"),
               *(package / "tokenizer").glob("checkpoint_*.py"), *(package / "models/parts").glob("checkpoint_*.py"),
               package / "quantize" / "checkpoint.py", package / "quantize" / "general_metadata.py"]  # fmt: skip
    ways = {"read_bytes", "read_text", "is_file", "is_dir", "exists", "glob", "rglob", "iterdir", "stat", "scandir"}
    for path in readers:
        found = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        assert not found & ways, path


def test_a_hub_gives_every_file_that_is_read_and_one_whole_file_before_an_index(
    server: StandIn, tmp_path: Path
) -> None:
    others = {"chat_template.jinja": "{{ messages }}", "README.md": "# A", "model.safetensors.index.json": "{}"}
    files = {path.name: path.read_bytes() for path in whole(tmp_path / "made", others).iterdir()}
    server.serve_repository("o/r", files | {"additional_chat_templates/tool.jinja": b"{{ tools }}"}, lfs=False)
    with open_input("hf:o/r") as source:
        assert source.metadata["tokenizer.chat_template.tool"][0] == "{{ tools }}"
    server.serve_repository("o/adapted", files | {"adapter_config.json": b"{}"}, lfs=False)
    with pytest.raises(EdgeLLMError) as caught:
        open_input("hf:o/adapted")
    assert caught.value.code == "CHECKPOINT_ADAPTER"
