"""Adapters that PEFT has made, converted: the logits of the model that PEFT merges them into."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_programs import cpu_executor, single_sequence
from test_models import MODELS, transformers_model
from tiny_models import write_transformers_model

from edgellm.adapters.lora import open_lora
from edgellm.adapters.rewrite import adapted
from edgellm.cli import main
from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.quantize.adapter import open_adapter
from edgellm.quantize.convert import convert

peft = pytest.importorskip("peft", reason="the judge of adapters is PEFT: pip install peft")
torch = pytest.importorskip("torch")

N_TOKENS = 48
QV = ["q_proj", "v_proj"]
ALL = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, all products": ("llama", {"target_modules": [*ALL, "lm_head", "embed_tokens"]}),
    "llama, one key head": ("llama one key head", {"target_modules": ALL}),
    "llama, biases": ("llama biases", {"target_modules": ALL}),
    "qwen3, by the root of the rank": ("qwen3", {"target_modules": QV, "use_rslora": True}),
    "qwen3, ranks of their own": (
        "qwen3",
        {"target_modules": ALL, "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 7},
         "alpha_pattern": {"layers.0.self_attn.q_proj": 3, r"mlp\.down_proj": 40}},
    ),
    "gemma3": ("gemma3", {"target_modules": ALL}),
    "gemma3, embedding": ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}),
    "qwen3moe, experts": ("qwen3moe", FUSED),
    "mixtral, experts": ("llama mixtral", FUSED),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "qwen3next": ("qwen3next", {"target_modules": ["q_proj", "out_proj"]}),
    "qwen35": ("qwen35", {"target_modules": ["q_proj", "in_proj_qkv", "in_proj_z", "out_proj", "down_proj"]}),
}  # fmt: skip
CASES = {name: case for name, case in CASES.items() if case[0] in MODELS}


def make(folder: Path, kind: str, options: dict[str, Any], **more: Any) -> tuple[Any, Path, Path]:
    """A model of transformers with a random adapter, the folder of that, and a GGUF file of the model."""
    model = transformers_model(*MODELS[kind])
    model.config.save_pretrained(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps({**config, "architectures": [type(model).__name__]}))
    gguf = write_transformers_model(folder / "model.gguf", model)
    with_adapter = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, **(options | more)))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in with_adapter.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.15)
    with_adapter.save_pretrained(folder / "lora")
    return with_adapter.eval(), folder / "lora", gguf


def row_nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """Of the row in the middle: where bits are rounded, a token may be sent to another expert."""
    return float(np.median([nmse(*rows) for rows in zip(found, expected, strict=True)]))


@pytest.mark.parametrize("case", CASES)
def test_a_converted_adapter_gives_the_logits_of_pefts_merged_model(case: str, tmp_path: Path) -> None:
    judge, folder, model = make(tmp_path, *CASES[case])
    with open_adapter(folder, tmp_path / "base") as source:
        (file,) = convert(source, tmp_path / "lora.gguf")
    lora = open_lora(file)
    with GGUFFile.open(model) as gguf:
        plain = build_program(gguf)
        program = replace(plain, adapted=adapted(plain, [lora]))
        batch = single_sequence(program, N_TOKENS, seed=1, max_id=120)
        one = replace(batch, adapters=np.ones((N_TOKENS, 1), np.float32))
        tokens = torch.tensor(batch.tokens[None].astype(np.int64))
        with torch.no_grad():
            unmerged = judge(input_ids=tokens).logits[0].float().numpy()
            expected = judge.merge_and_unload()(input_ids=tokens).logits[0].float().numpy()
        if "embed_tokens" in CASES[case][1]["target_modules"] and judge.config.tie_word_embeddings:
            expected = unmerged  # merging would change the output, too
        assert nmse(unmerged, expected) < 1e-9
        found = ReferenceExecutor(program).run(one)
        assert nmse(found, expected) <= 1e-6
        assert nmse(ReferenceExecutor(program).run(batch), expected) > 1e-3, "the adapter changes nothing"
        executor = cpu_executor(program, 8)
        try:
            assert row_nmse(executor.run(one), expected) <= 1e-5, "keys and values have 11 bits there"
        finally:
            executor.close()
    lora.close()


def test_the_base_may_be_a_gguf_file_or_what_the_adapter_names(tmp_path: Path, capsys: Any) -> None:
    _, folder, model = make(tmp_path, "llama", {"target_modules": QV})
    written = []
    for arguments in (["--base", str(tmp_path / "base")], ["--base", str(model)]):
        assert main(["convert", str(folder), str(tmp_path / "lora.gguf"), *arguments]) == 0, capsys.readouterr().err
        written.append((tmp_path / "lora.gguf").read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    assert main(["convert", str(folder), str(tmp_path / "lora.gguf")]) == 0
    assert written == [(tmp_path / "lora.gguf").read_bytes()] * 2
    assert main(["convert", str(folder), str(tmp_path / "h.gguf"), "--outtype", "f16"]) == 0
    with GGUFFile.open(tmp_path / "h.gguf") as half:
        assert {tensor.quant.name for tensor in half.tensors.values()} == {"F16"}
    assert main(["convert", str(model), str(tmp_path / "x.gguf"), "--base", str(model)]) == 1


Change = Callable[[Path], None]


def config_with(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def tensors_with(change_of: Callable[[dict[str, Any]], None]) -> Change:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "adapter_model.safetensors")
        change_of(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
HALF = NAME.replace("lora_B", "lora_A")
WRONG: dict[str, tuple[Change, str]] = {
    "dora": (config_with(use_dora=True), "use_dora is True"),
    "ia3": (config_with(peft_type="IA3"), "peft_type"),
    "pissa": (config_with(init_lora_weights="pissa"), "init_lora_weights"),
    "bias": (config_with(bias="all"), "bias is .?all"),
    "whole modules": (config_with(modules_to_save=["lm_head"]), "modules_to_save"),
    "layers again": (config_with(layer_replication=[[0, 1]]), "layer_replication"),
    "activated": (config_with(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "a new key": (config_with(use_newlora=True), "use_newlora"),
    "no rank": (config_with(r="4"), "rank"),
    "another rank": (config_with(r=3), "ranks that agree"),
    "alpha NaN": (config_with(lora_alpha=float("nan")), "lora_alpha|NaN"),
    "alpha 0": (config_with(lora_alpha=0), "lora_alpha"),
    "a pattern without end": (config_with(rank_pattern={"(a+)+$": 2}), "rank_pattern has"),
    "half a pair": (tensors_with(lambda t: t.pop(NAME)), "one half of a pair"),
    "NaN": (tensors_with(lambda t: t[NAME].fill_(float("nan"))), "NaN"),
    "another tensor": (tensors_with(lambda t: t.update({"x.magnitude": torch.ones(2, 2)})), "x.magnitude"),
    "rows": (tensors_with(lambda t: t.update({NAME: torch.ones(3, 4)})), "rows|shape"),
    "a rank that is none of its experts'": (config_with(r=2), "rank is 2.*ranks that agree"),
    "A of another width": (tensors_with(lambda t: t.update({HALF: torch.ones(4, 60)})), "columns"),
    "a layer too many": (
        tensors_with(lambda t: t.update({re.sub("s.0.", "s.99.", name): t.pop(name) for name in list(t)})),
        "no place",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make(folder, "llama", {"target_modules": ["q_proj"]})
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_converted_is_refused_by_name(case: str, sound: Path, tmp_path: Path) -> None:
    change, message = WRONG[case]
    for file in (sound / "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    with pytest.raises(EdgeLLMError, match=message), open_adapter(tmp_path, sound / "base") as source:
        convert(source, tmp_path / "lora.gguf")
    with pytest.raises(EdgeLLMError, match="--base"):
        open_adapter(sound / "lora", None)


SIZES: dict[str, tuple[str, tuple[int, int]]] = {
    "q_proj": ("self_attn.q_proj", (64, 64)),
    "k_proj": ("self_attn.k_proj", (64, 32)),
    "v_proj": ("self_attn.v_proj", (64, 32)),
    "o_proj": ("self_attn.o_proj", (64, 64)),
    "up_proj": ("mlp.up_proj", (64, 96)),
    "down_proj": ("mlp.down_proj", (96, 64)),
}
"""Columns and rows of the modules of a layer of the model below."""
UNKNOWN = ("up_proj", "down_proj")  # of which config.json says one side alone


def write_pair(folder: Path, module: str, n_in: int, n_out: int) -> Path:
    """A folder of PEFT's with one pair."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = f"base_model.model.model.layers.0.{module}"
    pair = {"A": np.ones((2, n_in), np.float32), "B": np.ones((n_out, 2), np.float32)}
    halves = {f"{name}.lora_{half}.weight": values for half, values in pair.items()}
    save_file(halves, folder / "adapter_model.safetensors")
    return folder


def test_a_pair_of_another_width_than_its_weight_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Qwen3Config(**sizes, **heads, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(tmp_path / "base")
    gguf = write_transformers_model(tmp_path / "model.gguf", transformers.Qwen3ForCausalLM(config))
    for name, (module, (n_in, n_out)) in SIZES.items():
        for base in (tmp_path / "base", gguf):
            with open_adapter(write_pair(tmp_path / "lora", module, n_in, n_out), base) as source:
                (file,) = convert(source, tmp_path / "lora.gguf")
            with GGUFFile.open(gguf) as model:
                program, lora = build_program(model), open_lora(file)
                assert adapted(program, [lora]).n_adapters == 1
                lora.close()
            for wrong in ((n_in - 8, n_out), (n_in, n_out + 8)):
                if base != gguf and name in UNKNOWN and (wrong[0] == n_in) == (name == "up_proj"):
                    continue
                write_pair(tmp_path / "lora", module, *wrong)
                with pytest.raises(EdgeLLMError, match=r"of its base|its base has them"):
                    open_adapter(tmp_path / "lora", base)


def test_rows_of_every_head_that_gguf_files_cut_have_no_place(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 2}
    config = transformers.DeepseekV3Config(**sizes, architectures=["DeepseekV3ForCausalLM"])
    config.save_pretrained(tmp_path / "base")
    folder = write_pair(tmp_path / "lora", "self_attn.kv_b_proj", 32, 4 * 32)
    with pytest.raises(EdgeLLMError, match=r"kv_b_proj.*in another form"):
        open_adapter(folder, tmp_path / "base")
    with open_adapter(write_pair(folder, "self_attn.kv_a_proj_with_mqa", 64, 96), tmp_path / "base") as source:
        assert set(source.tensors) == {f"blk.0.attn_kv_a_mqa.weight.lora_{half}" for half in "ab"}
