"""Every tensor gets the type that llama-quantize gives it."""

from __future__ import annotations

import pytest
import quantize_plans

from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.formats.file_types import WRITTEN
from edgellm.quantize.mixes import Recipe, parse_file_type, parse_override, parse_tensor_type, plan

RECIPES: dict[str, dict[str, object]] = {
    "plain": {},
    "pure": {"pure": True},
    "leave output": {"leave_output": True},
    "named": {
        "output_type": "Q5_1",
        "embedding_type": "Q4_0",
        "overrides": (parse_override("ffn_(down|up)=q8_0"), parse_override("blk\\.1\\.attn_v=q6_k")),
    },
}


@pytest.mark.parametrize("case", quantize_plans.DIGESTS)
def test_types_are_those_of_llama_quantize(case: str) -> None:
    source = quantize_plans.source(case)
    for options, digests in quantize_plans.DIGESTS[case].items():
        for file_type, expected in zip(WRITTEN, digests, strict=True):
            if expected:  # 0: llama-quantize refuses
                planned = plan(source, Recipe(file_type, **RECIPES[options]))
                types = [(tensor.name, tensor.target.name) for tensor in planned]
                assert quantize_plans.digest(types) == expected, f"{file_type} {options}: {types}"


def test_q4_k_m_spelled_out() -> None:
    planned = {tensor.name: tensor.target.name for tensor in plan(quantize_plans.source("llama 11"), Recipe("Q4_K_M"))}
    more = [i for i in range(11) if planned[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert more == [0, 3, 6, 9, 10]  # the first and last eighth, every third between
    assert more == [i for i in range(11) if planned[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    assert planned["output.weight"] == "Q6_K" and planned["token_embd.weight"] == "Q4_K"
    assert planned["output_norm.weight"] == "F32"
    assert {planned[f"blk.{i}.{name}.weight"] for i in range(11) for name in ("attn_q", "ffn_up")} == {"Q4_K"}


def test_a_row_that_blocks_do_not_divide_falls_back_and_says_so() -> None:
    planned = {tensor.name: tensor for tensor in plan(quantize_plans.source("llama narrow"), Recipe("Q4_K_M"))}
    tensor = planned["blk.0.attn_q.weight"]
    assert tensor.target.name == "Q5_0" and tensor.note == "Q4_K needs rows of a multiple of 256, these have 288"
    odd = {tensor.name: tensor.target.name for tensor in plan(quantize_plans.source("llama odd"), Recipe("Q8_0"))}
    assert odd["blk.0.attn_q.weight"] == "F16"


def test_an_importance_matrix_changes_the_first_layers() -> None:
    source = quantize_plans.source("qwen2")
    with_importance = {t.name: t.target.name for t in plan(source, Recipe("Q4_0"), with_importance=True)}
    assert with_importance["blk.1.ffn_down.weight"] == "Q4_1" and with_importance["blk.2.ffn_down.weight"] == "Q4_0"
    assert [t.name for t in plan(source, Recipe("Q2_K_S")) if t.needs_importance]


def test_names_are_taken_in_any_case_and_others_named() -> None:
    assert parse_file_type("q4_k") == "Q4_K_M" and parse_file_type("iq4_xs") == "IQ4_XS"
    assert parse_tensor_type("q6_K") == "Q6_K"
    with pytest.raises(UnsupportedError, match="'IQ2_M' is no type that edgellm writes"):
        parse_file_type("IQ2_M")
    with pytest.raises(UnsupportedError, match="'Q4_K_M' is no tensor type"):
        parse_tensor_type("Q4_K_M")
    for text in ("ffn_down", "=q8_0", "ffn_down=", "ffn_(down=q8_0"):
        with pytest.raises(ParameterError, match="is no"):
            parse_override(text)
