"""What checkpoints of encoders say in other words, keep beside them, or say that no file can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import edit_json, save_tensors
from test_encoder_families import save
from test_encoders import batch_of, nmse

import edgellm
from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.pooling import head_tensors
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.quantize.checkpoint import open_checkpoint
from edgellm.quantize.convert import convert

NOMIC = {
    "n_embd": 48, "n_inner": 80, "n_layer": 4, "n_head": 4, "n_positions": 8192, "max_trained_positions": 2048,
    "activation_function": "swiglu", "layer_norm_epsilon": 1e-12, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "prenorm": False,
    "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "causal": False, "use_rms_norm": False,
    "parallel_block": False, "scale_attn_weights": True, "use_flash_attn": True, "type_vocab_size": 2,
}  # fmt: skip


def metadata_of(folder: Path) -> dict[str, Any]:
    with open_checkpoint(folder) as source:
        return {key: value for key, (value, _) in source.metadata.items()}


def test_nomic_bert_in_its_authors_words_is_the_same_model(tmp_path: Path) -> None:
    save(tmp_path, "nomic-bert")
    usual = metadata_of(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").unlink()
    edit_json(
        tmp_path / "config.json", architectures=["NomicBertModel"], model_type="nomic_bert",
        vocab_size=config["vocab_size"], **NOMIC,
    )  # fmt: skip
    theirs = metadata_of(tmp_path)
    for key in usual:
        if key.startswith("nomic-bert."):
            assert theirs[key] == usual[key], key
    others = {"prenorm": True, "moe_every_n_layers": 2, "rotary_emb_fraction": 0.5, "new": 1, "mlp_fc1_bias": True}
    for key, value in others.items():
        edit_json(tmp_path / "config.json", **{key: value})
        # with experts it is another architecture, whose curve is another
        with pytest.raises(UnsupportedError, match="activation_function" if key.startswith("moe") else key):
            metadata_of(tmp_path)
        edit_json(tmp_path / "config.json", **{key: NOMIC.get(key)})


def test_a_pair_has_one_type_where_the_pieces_are_not_berts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the judge of scores is transformers on torch")

    model = save(tmp_path, "xlm-roberta that ranks")
    assert model.config.type_vocab_size == 2
    with open_checkpoint(tmp_path) as source:
        convert(source, tmp_path / "model.gguf", "f32")
    with edgellm.load(tmp_path / "model.gguf") as llm:
        query, document = (llm.tokenize(text) for text in ("the work", "a license of any work"))
        ids = torch.tensor([[*query, query[-1], *document[1:]]])  # <s> query </s></s> document </s>
        judge = float(model(ids).logits)
        assert abs(llm.rerank("the work", ["a license of any work"])[0].score - judge) < 1e-3 * abs(judge)


def test_a_pair_of_modern_bert_is_that_of_its_own_tokenizer(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the judge of scores is transformers on torch")
    from transformers import AutoTokenizer

    model = save(tmp_path, "modern-bert that ranks")
    file = tmp_path / "tokenizer.json"
    ids = {one["content"]: one["id"] for one in json.loads(file.read_text("utf-8"))["added_tokens"]}
    first, last = "<|im_start|>", "<|im_end|>"  # which stand for [CLS] and [SEP]
    around = [{"SpecialToken": {"id": text, "type_id": 0}} for text in (first, last)]
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    single, pair = [around[0], texts[0], around[1]], [around[0], texts[0], around[1], texts[1], around[1]]
    marks = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (first, last)}
    edit_json(
        file, post_processor={"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": marks}
    )
    edit_json(
        tmp_path / "tokenizer_config.json", cls_token=first, sep_token=last, bos_token=None, eos_token=None,
        chat_template=None,
    )  # fmt: skip
    with open_checkpoint(tmp_path) as source:
        convert(source, tmp_path / "model.gguf", "f32")
    pair_ids = AutoTokenizer.from_pretrained(tmp_path)("the work", "a license of any work")["input_ids"]
    assert pair_ids.count(ids[last]) == 2
    judge = float(model(torch.tensor([pair_ids])).logits)
    with edgellm.load(tmp_path / "model.gguf") as llm:
        assert abs(llm.rerank("the work", ["a license of any work"])[0].score - judge) < 1e-3 * abs(judge)


def write_projections(folder: Path) -> list[np.ndarray]:
    """sentence-transformers' files of EmbeddingGemma; the two matrices."""
    rng = np.random.default_rng(2)
    kinds = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
    modules = [
        {"path": f"{i}_{kind}" * (i > 0), "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    (folder / "1_Pooling").mkdir()
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True)
    found = []
    for i, (n_in, n_out) in ((2, (48, 96)), (3, (96, 48))):
        (folder / f"{i}_Dense").mkdir()
        edit_json(folder / f"{i}_Dense" / "config.json", in_features=n_in, out_features=n_out, bias=False)
        matrix = rng.standard_normal((n_out, n_in)).astype(np.float32)
        save_tensors(folder / f"{i}_Dense" / "model.safetensors", {"linear.weight": matrix})
        found.append(matrix)
    return found


def test_projections_behind_the_pooling_travel_with_the_model(tmp_path: Path) -> None:
    save(tmp_path, "gemma-embedding with one kind of layers")
    first, second = write_projections(tmp_path)
    with open_checkpoint(tmp_path) as source:
        convert(source, tmp_path / "model.gguf", "f32")
    with GGUFFile.open(tmp_path / "model.gguf") as gguf:
        assert gguf.metadata["gemma-embedding.dense_2_feat_out"] == 96
        program = build_program(gguf)
        pooling = program.pooling
        assert pooling is not None and pooling.kind == "mean"
        rows = ReferenceExecutor(program, 0).run(batch_of([np.arange(9, 30, dtype=np.int32)]))
        mean = rows.mean(axis=0)
        assert (
            nmse(pooling.through_head(mean, head_tensors(pooling, program.tensors)), second @ (first @ mean)) <= 1e-10
        )


@pytest.mark.parametrize("damage", ["curve", "bias", "file", "third", "module"])
def test_projections_that_no_file_can_hold_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    save(tmp_path, "gemma-embedding with one kind of layers")
    matrix, _ = write_projections(tmp_path)
    dense = tmp_path / "2_Dense"
    modules = json.loads((tmp_path / "modules.json").read_text("utf-8"))
    if damage == "curve":
        edit_json(dense / "config.json", activation_function="torch.nn.modules.activation.Tanh")
    if damage == "bias":
        bias = np.zeros(96, np.float32)
        save_tensors(dense / "model.safetensors", {"linear.weight": matrix, "linear.bias": bias})
    if damage == "file":
        (dense / "model.safetensors").unlink()
    if damage in ("third", "module"):
        more = modules[2] if damage == "third" else {"type": "my.Own", "path": ""}
        (tmp_path / "modules.json").write_text(json.dumps([*modules, more]), "utf-8")
    with pytest.raises((UnsupportedError, FormatError)):
        metadata_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("roberta", "pad_token_id", "x"),
        ("roberta", "pad_token_id", 5000),
        ("roberta", "hidden_act", "relu"),
        ("roberta", "position_embedding_type", "relative_key"),
        ("modern-bert", "norm_bias", True),
        ("modern-bert", "hidden_activation", "relu"),
        ("modern-bert that ranks", "classifier_pooling", "max"),
        ("gemma-embedding", "use_bidirectional_attention", False),
        ("distilbert", "activation", "relu"),
        ("jina-bert-v3", "lora_adaptations", ["x"]),
    ],
)
def test_settings_that_the_architecture_does_not_have_are_refused_by_name(
    name: str, key: str, value: Any, tmp_path: Path
) -> None:
    save(tmp_path, name)
    edit_json(tmp_path / "config.json", **{key: value})
    with pytest.raises((UnsupportedError, FormatError)) as error:
        metadata_of(tmp_path)
    assert key in str(error.value) or (value == 5000 and "pad_token_id" in str(error.value))
