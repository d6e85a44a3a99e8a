"""Models of many shapes, without weights, and which tensor types llama-quantize gives them.

``DIGESTS`` are CRC-32 of lines ``name type`` in the order of the file, for each case, set of options and file
type in the order of FILE_TYPES; 0 where llama-quantize refuses. Made by llama-quantize from the same tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.quantize.input_model import InputModel, InputTensor

Shapes = dict[str, tuple[int, ...]]


def shapes(
    n_layer: int, n_embd: int, n_kv: int, n_ff: int, *, tied: bool, n_expert: int = 0, fused: bool = False
) -> Shapes:
    """Tensors of a transformer by name; experts have one tensor of three dimensions, ``fused`` one of q, k and v."""
    found: Shapes = {"token_embd.weight": (64, n_embd), "output_norm.weight": (n_embd,)}
    if not tied:
        found["output.weight"] = (64, n_embd)
    for i in range(n_layer):
        layer: Shapes = {"attn_norm": (n_embd,), "attn_output": (n_embd, n_embd), "ffn_norm": (n_embd,)}
        if fused:
            layer["attn_qkv"] = (n_embd + 2 * n_kv, n_embd)
        else:
            layer |= {"attn_q": (n_embd, n_embd), "attn_k": (n_kv, n_embd), "attn_v": (n_kv, n_embd)}
        if n_expert:
            layer |= {"ffn_gate_inp": (n_expert, n_embd), "ffn_gate_exps": (n_expert, n_ff, n_embd)}
            layer |= {"ffn_up_exps": (n_expert, n_ff, n_embd), "ffn_down_exps": (n_expert, n_embd, n_ff)}
        else:
            layer |= {"ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


def _keys(
    architecture: str, n_layer: int, n_embd: int, heads: tuple[int, int], n_ff: int, **more: int
) -> dict[str, Any]:
    numbers = {"block_count": n_layer, "context_length": 256, "embedding_length": n_embd, "feed_forward_length": n_ff}
    numbers |= {"attention.head_count": heads[0], "attention.head_count_kv": heads[1], "vocab_size": 64, **more}
    epsilon = "attention.layer_norm_epsilon" if architecture == "falcon" else "attention.layer_norm_rms_epsilon"
    keys: dict[str, Any] = {"general.architecture": (architecture, "STRING")}
    keys |= {f"{architecture}.{name}": (value, "UINT32") for name, value in numbers.items()}
    return keys | {f"{architecture}.{epsilon}": (1e-5, "FLOAT32"), "tokenizer.ggml.model": ("no_vocab", "STRING")}


FLOATS = ("ffn_gate_inp.weight", "ssm_conv1d.weight", ".bias")
"""Ends of names of what is float32 though it is no vector."""
FAMILIES = ("qwen2moe", "qwen3moe", "olmoe", "granitemoe", "gpt-oss", "qwen35", "qwen35moe", "qwen3next", "gemma4")
"""Architectures whose tensors are those of tests/tiny_models.py."""
N_LAYER, N_EMBD, HEAD_DIM = 11, 256, 64


def _family(architecture: str) -> tuple[dict[str, Any], Shapes]:
    experts = {"expert_count": tiny_models.N_EXPERT, "expert_used_count": 2} if architecture != "qwen35" else {}
    keys = _keys(architecture, N_LAYER, N_EMBD, (4, 2), N_EMBD, **experts)
    sizes = N_EMBD, N_EMBD, 4 * HEAD_DIM, 2 * HEAD_DIM, HEAD_DIM
    return keys, tiny_models.tensor_shapes(architecture, 64, N_LAYER, *sizes, tied=architecture == "gemma4")


CASES: dict[str, tuple[dict[str, Any], Shapes]] = {
    "llama 11": (_keys("llama", 11, 256, (8, 2), 256), shapes(11, 256, 64, 256, tied=False)),
    "llama narrow": (_keys("llama", 5, 288, (9, 3), 320), shapes(5, 288, 96, 320, tied=True)),
    "llama odd": (_keys("llama", 2, 48, (3, 3), 80), shapes(2, 48, 48, 80, tied=False)),
    "llama 80": (_keys("llama", 80, 256, (8, 1), 256), shapes(80, 256, 32, 256, tied=False)),
    "llama 8 experts": (
        _keys("llama", 10, 256, (4, 2), 256, expert_count=8, expert_used_count=2),
        shapes(10, 256, 128, 256, tied=False, n_expert=8),
    ),
    "llama 4 experts": (
        _keys("llama", 10, 256, (8, 2), 512, expert_count=4, expert_used_count=2),
        shapes(10, 256, 64, 512, tied=False, n_expert=4),
    ),
    "qwen2": (_keys("qwen2", 17, 256, (4, 2), 256), shapes(17, 256, 128, 256, tied=True)),
    "qwen3": (_keys("qwen3", 3, 256, (8, 2), 768), shapes(3, 256, 64, 768, tied=False)),
    "gemma3": (_keys("gemma3", 26, 256, (4, 1), 512), shapes(26, 256, 64, 512, tied=True)),
    "falcon": (_keys("falcon", 32, 256, (8, 1), 256), shapes(32, 256, 32, 256, tied=False, fused=True)),
    **{name: _family(name) for name in FAMILIES},
}

OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "pure": ("--pure",),
    "leave output": ("--leave-output-tensor",),
    "named": (
        *("--output-tensor-type", "q5_1", "--token-embedding-type", "q4_0"),
        *("--tensor-type", "ffn_(down|up)=q8_0", "--tensor-type", "blk\\.1\\.attn_v=q6_k"),
    ),
}


def source(case: str) -> InputModel:
    """A model of F16 zeros."""
    metadata, tensors = CASES[case]
    f16 = QUANT_TYPES["F16"]

    def tensor(name: str, shape: tuple[int, ...]) -> InputTensor:
        quant = QUANT_TYPES["F32"] if len(shape) == 1 or name.endswith(FLOATS) else f16
        n_in = shape[-1]
        return InputTensor(
            name,
            shape,
            quant,
            decode=lambda start, stop: np.zeros((stop - start, n_in), np.float32),
            stored=lambda start, stop: np.zeros((stop - start, quant.row_nbytes(n_in)), np.uint8),
        )

    return InputModel(
        Path("zeros.gguf"), "gguf", metadata, {name: tensor(name, shape) for name, shape in tensors.items()}
    )


def digest(types: Iterable[tuple[str, str]]) -> int:
    """CRC-32 of names and types."""
    return zlib.crc32("\n".join(f"{name} {quant}" for name, quant in types).encode())


_DIGESTS = """
llama 11 / plain
    b60185d 2d926d6b c76c1da7 48c5d775 be5dbf47 5c52676a 3182c20b 24fab948 8356f3db 2572f71 90b19840 e89f6fb3
    4f332520 8544662e 64dabbdb 48c5d775 bf157f02 dc1833be f54d3ed2 1bbe2ea7 0 d931465c 7f618ecd
llama 11 / pure
    b60185d 2d926d6b c76c1da7 48c5d775 be5dbf47 69fe7e5e 69fe7e5e 1a920403 edc99f64 249f3ea9 249f3ea9 57f344f4
    a0a8df93 f81f6a9 6efdc2a0 2b931b47 1dc8fa2d 1dc8fa2d 1dc8fa2d 50a9bada 0 54cc7977 20eb6449
llama 11 / leave output
    a6394c99 2d926d6b 8f8d3ee5 75a56789 d625021d 342ada30 59fa7f51 4c820412 eb2e4e81 6a2f922b f8c9251a
    80e7d2e9 274b987a 111ce5d1 f0823824 75a56789 d76dc258 b4608ee4 9d358388 73c693fd 0 4505b8bd e355702c
llama 11 / named
    819a82dd 2d38304e bc5e7059 a47f8a1c 7c6120d9 8fdb493 36187d85 5305337a d9ec3026 2489c755 6e564d6e dc02fa71
    56ebf92d a4837a52 fd72a556 a47f8a1c afa6b25f c644e9f3 a2eac73d 51e40903 0 1706b3f7 aae770bd
llama narrow / plain
    4865709d 26d1240e 526978b7 a5d3f112 a5d3f112 d9551e23 422575ac 422575ac 536864cb ab8533af 598e8d3c 229b973
    1364a814 9fe36a96 9fe36a96 a5d3f112 11b1a0a0 e8778424 1364a814 1364a814 0 1364a814 1364a814
llama odd / plain
    380f6d4f 858c410f 3eba17f1 858c410f 858c410f 858c410f 858c410f 858c410f 858c410f 858c410f 858c410f
    858c410f 858c410f 858c410f 858c410f 858c410f 858c410f 858c410f 858c410f 858c410f 0 858c410f 858c410f
llama 80 / plain
    8ce22599 710b13b8 7b49d2a1 b48469f8 3b2a91b4 c676dd74 5ef40fe6 440cc122 5f82abaf d513778d 21e58575
    6746b4ec 7cc8de61 f13f798c 1ba1a23e b48469f8 5e776a34 2a03c419 5407b19e e2e82206 0 b06691f1 ac974ffd
llama 8 experts / plain
    27ac38be a3c4b5c8 c47bc4cb 9e3dd826 b507bf98 d2ad84df f4b219df f32d12db 8b86a0d 6fb6c80e f9fb0ee2 7a9172d9
    81040a0f 64928f4e 8186fb7c a199d0bf 3e7c7346 3867518a 803485bb 67fcb273 0 b227a9dc e4d6c808
llama 4 experts / plain
    27ac38be a3c4b5c8 c47bc4cb 9e3dd826 e9063b6 2ad287c6 4fdaca6 ae51cd2e 733013e2 803c2629 935cefc a87577de
    7514a912 f919d8b0 dd79715b a199d0bf 8cac0f6f 3a35358e 10263286 5ab414a8 0 b249a9d7 428b9f41
qwen2 / plain
    d1f2854e a48f951a dd9cf313 fd275604 1838f991 bc771fda ecf4d4f0 97204bb4 8df294f9 6962bfdc 93da61dc
    c49baf6b de497026 44ff3c10 653d3f1e fd275604 e3bf8d2e 8d9bdc0c de1d8873 dc8113d6 0 35bcff3e 337911eb
qwen2 / pure
    d1f2854e a48f951a dd9cf313 fd275604 1838f991 501f8ab3 501f8ab3 68c8516b 88064fec ded25992 ded25992
    e605824a 6cb9ccd 25cf8842 5b548a87 bd6a39e7 c0516cf7 c0516cf7 c0516cf7 4e9cbfd6 0 e4a64332 ca38f9f6
qwen2 / leave output
    d1f2854e a48f951a dd9cf313 fd275604 1838f991 bc771fda ecf4d4f0 97204bb4 8df294f9 6962bfdc 93da61dc
    c49baf6b de497026 44ff3c10 653d3f1e fd275604 e3bf8d2e 8d9bdc0c de1d8873 dc8113d6 0 35bcff3e 337911eb
qwen2 / named
    1994bf2e 1873f6e8 960cc14 a7220006 f7a6f75 71197ff0 ca70ce27 7f3f60d4 46ece902 5b387073 75bc5cf5 3c39001a
    5ea89cc aab70860 cd1317a0 a7220006 1931c55e e4403511 9b148ac2 e71c88b6 0 930883e6 eee6abc5
qwen3 / plain
    d6e8071 2e908b4c f24d5ce4 deb6e513 d77cd2ba 9de7a40b ba0ba617 70a2888d 6a4b157 12be745b 66c53449 54705b16
    227662cc 47e7ac19 7f9c0c2f deb6e513 ae9dd27f 4f06b4a 60e54f4d 55ca6b06 0 6cb0f1bf fd139d99
gemma3 / plain
    336412db d2e2ea90 3b4417d be7a82f be57c919 42338762 cb47f992 31b0c78f 668be1f6 a0c0bf74 68689d3c 1d40d7f6
    4a7bf18f 465174a1 8291e9a6 be7a82f 214315c9 3c719894 21679884 654d3f39 0 5411c6 6919b2a1
falcon / plain
    ac024ff8 303b8ddc 1ce4c1e1 6536669f 355d001f a070b4a4 1d7351c6 cddd8026 dd95114c af713d7 fa31edfb d5c7b091
    c58f21fb 4d8ccd6d dad7c4c6 6536669f f533919f adbc0ec9 4d2ff274 a2521af1 0 4186732b 5c65293d
qwen2moe / plain
    2b260dce 3109f44b 2b09ce72 207df490 1077b391 ed188261 9bd4b78 410c9083 d9993ddf b9c26d31 1326bca8 ff65c51b
    67f06847 82871c7d f774b948 ceb49f71 8cb23f1 7fef1b28 3a28baaa d7f92a49 0 c4c0ec86 78196d5b
qwen3moe / plain
    22a05a62 88376a5c 3f2be24b f351ec7 978394dc b354ab2d bb7e2cb 5a3aad9f 3ddc5cbc 19c943bd dbd93a50 2e297f92
    49cf8eb1 10de6294 1b8756ec 1af76684 3db1f553 85387172 e8ae08a4 577ff3df 0 72f8498 a463cdf0
olmoe / plain
    22a05a62 88376a5c 3f2be24b f351ec7 978394dc b354ab2d bb7e2cb 5a3aad9f 3ddc5cbc 19c943bd dbd93a50 2e297f92
    49cf8eb1 10de6294 1b8756ec 1af76684 3db1f553 85387172 e8ae08a4 577ff3df 0 72f8498 a463cdf0
granitemoe / plain
    a36775d5 46f28d2e e3e939d5 db0cec2b cb7e6cf8 6115f0d5 3cb1e9be 2100ffc5 fb5eb3dc b1e386f1 862b4672 c56a8138
    1f34cd21 394ee3c4 ead1bb2d d329cf62 d1982797 cdf65a78 85fe573 7ebbc69f 0 d54943d9 f6b71fe
gpt-oss / plain
    31e69947 6766e3a9 c48f783c c8a4cf6 e140792b f567b3fd 8b78d8ab ccc38ea6 b42423ee 4faa0870 98297fec 5c04ec19
    24e34151 67f76ce8 b399f66a 8c3127fa 762c14e4 ff2f98b9 5f099bab 2e07c756 0 91f829b1 c442664e
qwen35 / plain
    aee7bd0a b5abb0a9 bb3c51e1 1b8e2d90 cea15c f61efc92 2dafde01 c7d2ac80 b5b94e8b 1281ca17 6782be08 6a228474
    1849667f a6ac5f6e 673715b2 1b8e2d90 faee104a dd2ac135 776d20bb a9afcb8 0 15e7dd5e a44a8fe7
qwen35moe / plain
    94079ad1 97f68251 2b7cc47b 9cf5c0a8 64f148e 46d3d0b9 62cb0338 5c201cf5 ccd2f00b cf88916b 6e282bf 7fa3ee67
    ef510299 96fb56ff 233d5b68 d9a63b7 5374c1db 67c93725 abc32c54 4e310fa4 0 abd71389 af9bb3f3
qwen3next / plain
    d21181c9 e1fb9037 f1dd20 f97760da 9c512cbf 26568411 290edf7f a14a3844 20bffbcf 4fabe38b 93678f2a 7b506b3b
    faa5a8b0 996e66f1 52357b23 8e8e1d91 5638cd26 8532dee2 98c03ebe d6deb8ba 0 46d8559c 402d00b7
gemma4 / plain
    58849212 5904929a d14c8bd7 2587e2c1 359ebe2e cc4ac96a 1711ce91 3659fa6b 13a0c49e 9b06e456 f3cb77a5 9ef3d7c1
    bb0ae934 862f9f02 fa10dd5 693a8466 613731bf 9c9b764e 520f2fef 44fe0562 0 e8c3fa68 c475b74
"""


def _parsed(text: str) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = {}
    row: list[int] = []
    for line in text.strip().splitlines():
        if line.startswith(" "):
            row += [int(word, 16) for word in line.split()]
        else:
            case, _, options = line.partition(" / ")
            row = []
            found.setdefault(case, {})[options.strip()] = row
    return found


DIGESTS = _parsed(_DIGESTS)
