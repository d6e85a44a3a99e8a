"""Quantized checkpoints: each scheme's numbers as its package or published formula gives them, then whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import edit_json, save_byte_level, save_tensors
from packed_weights import LINEAR, PACKERS, Packed, compressed
from test_checkpoint_convert import TOKENS, reference_logits
from test_models import MODELS, ROUNDING, nmse, transformers_logits, transformers_model

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.checkpoints import SCHEMES, open_weights, scheme_of
from edgellm.formats.checkpoints.scheme_keys import HARMLESS, ONLY, USED
from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.quantize.convert import convert
from edgellm.quantize.inputs import open_input

torch = pytest.importorskip("torch", reason="the judges of packed weights are torch programs")
MODULE = "model.layers.0.mlp.up_proj"


def write_module(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Checkpoint:
    """A checkpoint of one packed module."""
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", as_torch({f"{MODULE}.{key}": value for key, value in tensors.items()}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return Checkpoint.open(folder)


def as_torch(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        key: (torch.from_numpy(value) if isinstance(value, np.ndarray) else value).contiguous()
        for key, value in tensors.items()
    }


def pack(name: str, shape: tuple[int, int] = (96, 128), seed: int = 0) -> Packed:
    rng = np.random.default_rng(seed)
    return PACKERS[name]((rng.standard_normal(shape) * shape[1] ** -0.5).astype(np.float32), rng)


@pytest.mark.parametrize("name", PACKERS)
def test_a_packed_matrix_is_what_its_scheme_says(name: str, tmp_path: Path) -> None:
    config, tensors, wanted = pack(name)
    weights = open_weights(write_module(tmp_path, config, tensors))
    assert list(weights) == [f"{MODULE}.weight"]
    weight = weights[f"{MODULE}.weight"]
    assert weight.shape == wanted.shape
    found = weight.decode(0, 96)
    assert found.dtype == np.float32
    # float32 products in another order than the judge's: the last bit may differ
    assert np.allclose(found, wanted, rtol=3e-7, atol=1e-9)
    for start, stop in ((0, 1), (7, 24), (95, 96), (33, 90)):
        assert np.array_equal(weight.decode(start, stop), found[start:stop]), (start, stop)


WHOLE_MODELS = [
    "gptq 4 bits act-order gptq", "gptq 3 bits gptq", "awq", "bitsandbytes nf4 nested", "bitsandbytes int8",
    "hqq 4 bits axis 1", "hqq 3 bits axis 0", "fp8 e4m3 block", "fp8 e4m3 channel", "mxfp4", "compressed int4 group",
    "compressed fp8", "mlx 4 bits", "mlx 6 bits",
    "compressed nvfp4", "modelopt nvfp4", "modelopt fp8",
]  # fmt: skip


def of_activations(name: str) -> dict[str, Any]:
    """What some schemes keep beside a matrix to round its inputs, or keys and values, by; no weight depends on it."""
    names = {"compressed nvfp4": ("input_global_scale", "k_scale"), "compressed fp8": ("input_scale", "output_scale")}
    wanted = names.get(name, ("input_scale", "v_scale") if name.startswith("modelopt") else ())
    return {part: np.full(1, 0.5, np.float32) for part in wanted}


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_a_model_of_packed_matrices_has_the_logits_of_the_unpacked_one(name: str, tmp_path: Path) -> None:
    kind, options = MODELS["llama"]
    sizes = {"vocab_size": 280, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    model = transformers_model(kind, options | sizes)
    tensors: dict[str, Any] = {}
    config: dict[str, Any] = {}
    with torch.no_grad():
        for i, (key, weight) in enumerate(model.state_dict().items()):
            if not LINEAR.fullmatch(key):
                tensors[key] = weight
                continue
            config, packed, wanted = pack(name, tuple(weight.shape), seed=i)
            weight.copy_(torch.from_numpy(np.ascontiguousarray(wanted)))
            packed |= of_activations(name)
            tensors |= {f"{key.removesuffix('.weight')}.{part}": value for part, value in packed.items()}
    save_byte_level(tmp_path)
    model.config.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=config, architectures=["LlamaForCausalLM"])
    save_tensors(tmp_path / "model.safetensors", as_torch(tensors))
    with open_input(tmp_path) as source:
        assert source.scheme == config.get("quant_method", "mlx")
        assert source.tensors["blk.0.attn_q.weight"].quantized
        assert not source.tensors["token_embd.weight"].quantized
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    assert nmse(reference_logits(path), transformers_logits(model, TOKENS)) <= ROUNDING


def test_modules_of_several_groups_have_their_own_settings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wanted, tensors, groups = {}, {}, {}
    mlp = "model.layers.0.mlp"
    int4 = {"num_bits": 4, "group_size": 32, "strategy": "group"}
    for module, form, targets, arguments in (
        (f"{mlp}.up_proj", "pack-quantized", ["re:.*up_proj"], int4),
        (f"{mlp}.down_proj", "float-quantized", ["Linear"], {"num_bits": 8, "type": "float", "strategy": "channel"}),
        (f"{mlp}.up_proj.1", "int-quantized", [f"{mlp}.up_proj.1"], {"num_bits": 8, "strategy": "tensor"}),
    ):
        matrix = rng.standard_normal((64, 96)).astype(np.float32)
        config, packed, wanted[module] = compressed(matrix, rng, form, **arguments)
        tensors |= {f"{module}.{part}": value for part, value in packed.items()}
        groups[module] = config["config_groups"]["group_0"] | {"targets": targets, "format": form}
    save_tensors(tmp_path / "model.safetensors", as_torch(tensors))
    quantization = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    weights = open_weights(Checkpoint.open(tmp_path))
    for module, matrix in wanted.items():
        assert np.allclose(weights[f"{module}.weight"].decode(0, 64), matrix, rtol=3e-7, atol=1e-9), module


def test_every_scheme_has_a_judge() -> None:
    judged = {name.split()[0] for name in PACKERS}
    assert {scheme.split("-")[0].split("_")[-1] for scheme in SCHEMES} <= judged


def test_mlx_modules_have_settings_of_their_own_under_either_key(tmp_path: Path) -> None:
    """As mlx-lm writes them: ``quantization`` beside, or instead of, ``quantization_config``."""
    _, four, wanted_four = pack("mlx 4 bits")
    _, eight, wanted_eight = pack("mlx 8 bits")
    names = {"model.embed_tokens": (eight, wanted_eight), MODULE: (four, wanted_four)}
    tensors = {f"{base}.{part}": value for base, (parts, _) in names.items() for part, value in parts.items()}
    save_tensors(tmp_path / "model.safetensors", as_torch(tensors))
    settings = {"group_size": 32, "bits": 4, "model.embed_tokens": {"group_size": 32, "bits": 8}, "lm_head": False}
    for config in ({"quantization": settings}, {"quantization": settings, "quantization_config": settings}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = open_weights(Checkpoint.open(tmp_path))
        for base, (_, wanted) in names.items():
            assert np.allclose(weights[f"{base}.weight"].decode(0, 96), wanted, rtol=3e-7, atol=1e-9), base


def test_a_mode_of_mlx_that_is_not_decoded_is_named(tmp_path: Path) -> None:
    _, tensors, _ = pack("mlx 4 bits")
    checkpoint = write_module(tmp_path, {"bits": 4, "group_size": 32, "mode": "mxfp4"}, tensors)
    with pytest.raises(UnsupportedError, match="mode mxfp4"):
        open_weights(checkpoint)


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
@pytest.mark.parametrize("value", [{}, None])
def test_an_empty_quantization_is_none(key: str, value: Any, tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", {f"{MODULE}.weight": np.ones((2, 2), np.float32)})
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    assert list(open_weights(Checkpoint.open(tmp_path))) == [f"{MODULE}.weight"]


def test_a_file_of_its_own_may_say_that_the_scheme_is_modelopts(tmp_path: Path) -> None:
    _, tensors, wanted = pack("modelopt nvfp4")
    write_module(tmp_path, {}, tensors)
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "hf_quant_config.json", quantization={"quant_algo": "NVFP4"})
    weight = open_weights(Checkpoint.open(tmp_path))[f"{MODULE}.weight"]
    assert np.allclose(weight.decode(0, 96), wanted, rtol=3e-7, atol=1e-9)


# -- files that lie --------------------------------------------------------------------------------------------------


BROKEN = ["gptq 4 bits act-order gptq", "awq", "bitsandbytes nf4 nested", "bitsandbytes int8", "hqq 4 bits axis 1"]
BROKEN += [
    "compressed nvfp4",
    "modelopt nvfp4",
    "modelopt fp8",
    "mlx 4 bits",
    "fp8 e4m3 block",
    "mxfp4",
    "compressed int4 zero point",
]


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_with_a_part_missing_or_of_another_shape_is_named(name: str, tmp_path: Path) -> None:
    config, tensors, _ = pack(name)
    tensors = as_torch(tensors)
    for part in tensors:
        for broken in (
            None,
            tensors[part].reshape(-1)[: max(1, tensors[part].numel() // 2)].clone(),
            torch.zeros(3, 5, 7),
        ):
            changed = {key: value for key, value in tensors.items() if key != part} | (
                {} if broken is None else {part: broken}
            )
            try:
                weights = open_weights(write_module(tmp_path, config, changed))
                for weight in weights.values():
                    assert len(weight.shape) in (1, 2, 3)
                    weight.decode(0, 1)
            except (FormatError, UnsupportedError) as error:
                assert error.code.startswith(("CHECKPOINT", "MODEL_SHAPE", "SAFETENSORS"))


@pytest.mark.parametrize("method", ["aqlm", None, 4, ["gptq"], "../gptq"])
def test_an_unknown_scheme_is_refused_by_name(method: Any, tmp_path: Path) -> None:
    checkpoint = write_module(tmp_path, {"quant_method": method}, {"weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UnsupportedError, match="decodes awq") as raised:
        open_weights(checkpoint)
    assert raised.value.code == "CHECKPOINT_SCHEME"


def test_groups_outside_the_scales_are_refused(tmp_path: Path) -> None:
    config, tensors, _ = pack("gptq 4 bits act-order gptq")
    tensors["g_idx"][3] = 4
    with pytest.raises(FormatError, match="g_idx"):
        open_weights(write_module(tmp_path, config, tensors))


def test_every_key_that_transformers_writes_for_a_scheme_is_known() -> None:
    quantization = pytest.importorskip("transformers.utils.quantization_config", reason="the judge is transformers")
    known = USED | HARMLESS | ONLY.keys()
    for name in ("AwqConfig", "BitsAndBytesConfig", "FineGrainedFP8Config", "FbgemmFp8Config", "Mxfp4Config"):
        assert set(getattr(quantization, name)().to_dict()) <= known, name
    assert set(quantization.GPTQConfig(bits=4).to_dict()) <= known


UNKNOWN = {"transform_config": {"config_groups": {"u": {}}}, "rotation": "hadamard", "dequantize": True, "newest": 7}


@pytest.mark.parametrize(("key", "value"), UNKNOWN.items())
def test_a_setting_of_a_scheme_that_is_not_known_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    checkpoint = write_module(tmp_path, {"quant_method": "gptq", key: value}, {"weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UnsupportedError, match=key) as caught:
        scheme_of(checkpoint)
    assert caught.value.code == "CHECKPOINT_SCHEME"
