"""``edgellm show``: what a model is, and what it will need."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.models import open_file
from edgellm.cli.options import WholeNumber, cache_type_options, cache_type_values, device_options, device_values
from edgellm.formats.errors import EdgeLLMError
from edgellm.machine.terminal import echo, fields, hand_over, human_bytes, human_count, json_text

if TYPE_CHECKING:
    from edgellm.formats.gguf import GGUFFile
    from edgellm.kernels.program import Program
    from edgellm.loading import LoadOptions

TEMPLATE_SHOWN = 400  # characters
PARTS = ("weights", "kv", "work")
POOLINGS = {
    "none": "none: a vector for each token",
    "mean": "mean of all tokens",
    "cls": "the first token",
    "last": "the last token",
    "rank": "rank: scores of a text, or of a question and a text",
}


@click.command("show")
@click.argument("model", metavar="MODEL")
@click.option("-c", "--ctx-size", "n_ctx", type=WholeNumber(0), default=0, help="Context for the memory estimate.")
@device_options
@cache_type_options
@click.option("--template", "whole_template", is_flag=True, help="Print the chat template and nothing else.")
@click.option("--metadata", is_flag=True, help="Print every metadata key of the file.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def command(model: str, n_ctx: int, whole_template: bool, metadata: bool, as_json: bool, **on: Any) -> None:
    """Show what a model is and what it will need.

    Architecture, size, types, context, tokenizer, chat template, recommended sampling, and memory. With --device the
    memory of each side, and which layers stand where.

    \b
    Examples:
      edgellm show smollm2
      edgellm show model.gguf -c 32768 --json
      edgellm show model.gguf --device gpu --cpu-moe
    """
    with open_file(model) as gguf:
        if whole_template:
            hand_over(f"{gguf.get('tokenizer.chat_template', str, '')}\n")
        elif metadata:
            _print_metadata(gguf, as_json)
        elif (adapter := _adapter_facts(gguf)) is not None:
            echo(json_text(adapter) if as_json else _adapter_text(adapter))
        else:
            facts = model_facts(gguf, n_ctx, **device_values(on), **cache_type_values(on))
            echo(json_text(facts) if as_json else _as_text(facts))


def model_facts(gguf: Any, n_ctx: int = 0, **device: Any) -> dict[str, Any]:
    """Everything that ``show`` knows of an open file, fit for JSON; ``n_ctx`` 0 takes the default context.

    device   executor, gpu_layers, cpu_moe and the types of the cache of ``LoadOptions``
    """
    from edgellm.loading import LoadOptions
    from edgellm.measure.model_card import model_card
    from edgellm.models import build_program

    card = model_card(gguf)
    facts: dict[str, Any] = {
        "path": str(card.path),
        **{name: getattr(card, name) for name in ("name", "model_type", "architecture", "n_params")},
        "size": card.nbytes,
        "file_type": card.file_type,
        "tensor_types": {name: {"tensors": n, "bytes": nbytes} for name, (n, nbytes) in card.tensor_types.items()},
        **{name: getattr(card, name) for name in ("n_layers", "n_embd", "n_heads", "n_kv_heads", "context_length")},
        "tokenizer": {"model": card.tokenizer, "pre": card.pre_tokenizer, "n_vocab": card.n_vocab},
        "chat_template": card.chat_template,
        "sampling": {key: _plain(value) for key, value in card.sampling.items()},
        "licence": card.licence,
    }
    options = LoadOptions(**device)
    try:
        program = build_program(gguf)
    except EdgeLLMError as error:
        return {**facts, "runnable": False, "reason": str(error)}
    facts["vectors"] = _vectors(program)
    return {**facts, "memory": _memory(program, gguf, n_ctx, options), "runnable": True, "reason": None}


def _vectors(program: Program) -> dict[str, Any]:
    """How the model makes a text into a vector: which rows it pools, and which tokens and types of text it knows."""
    from edgellm.kernels.ops import AddRows

    tables = [op.weight for op in program.ops if isinstance(op, AddRows) and op.of == "types"]
    pooling = program.pooling
    return {
        "is_encoder": program.is_encoder,
        "causal": not program.takes_whole_texts,
        "pooling": pooling.kind if pooling else None,
        "labels": list(pooling.labels) if pooling else [],
        "token_types": program.tensors[tables[0]].shape[0] if tables else None,
    }


def _vector_rows(vectors: dict[str, Any]) -> list[tuple[str, object]]:
    """For a model for embeddings or ranking, and for any other whose file says what it pools."""
    rows: list[tuple[str, object]] = []
    if vectors["is_encoder"]:
        types = vectors["token_types"]
        known = f", {types} type{'s' if types != 1 else ''} of text" if types else ""
        rows.append(("attention", f"both ways: an encoder, whose tokens see their whole text{known}"))
    elif not vectors["causal"]:
        rows.append(("attention", "both ways: it writes by denoising, all places of a block at once"))
    if vectors["pooling"]:
        labels = f" ({', '.join(vectors['labels'])})" if vectors["labels"] else ""
        rows.append(("pooling", POOLINGS[vectors["pooling"]] + labels))
    return rows


def _adapter_facts(gguf: GGUFFile) -> dict[str, Any] | None:
    """Of an adapter or a control vector; None for a model."""
    from edgellm.adapters.card import adapter_facts, kind_of_adapter

    kind = kind_of_adapter(gguf)
    return None if kind is None else adapter_facts(gguf.path, kind)


def _adapter_text(facts: dict[str, Any]) -> str:
    size = ("size", human_bytes(facts["size"]))
    if facts["kind"] == "control vector":
        layers = f"{len(facts['layers'])} from {facts['layers'][0]} to {facts['layers'][-1]}, width {facts['n_embd']}"
        rows = [("control vector", facts["path"]), ("of", facts["model_hint"] or "-"), ("layers", layers), size]
        return fields([*rows, ("use", "--control-vector FILE[:SCALE] beside its model")])
    ranks = ", ".join(map(str, facts["ranks"]))
    rows = [
        ("adapter", facts["name"] or "-"),
        ("file", facts["path"]),
        ("kind", f"LoRA for a model of the architecture {facts['architecture']}"),
        ("base model", facts["base_model.0.name"] or "-"),
        ("rank", f"{ranks}, alpha {facts['alpha']:g}"),
        ("weights", f"{facts['pairs']}: {', '.join(facts['weights'])}"),
        ("types", ", ".join(facts["types"])),
        size,
        ("licence", facts["license"] or "-"),
        ("use", "--lora FILE[:SCALE] beside its model"),
    ]
    return fields(rows)


def _memory(program: Program, gguf: Any, n_ctx: int, options: LoadOptions) -> dict[str, Any]:
    """What the model will take, and of what; "device" is the part of it on a GPU."""
    from edgellm.kernels.executors import device_memory
    from edgellm.loading import planned
    from edgellm.machine.memory import system_memory
    from edgellm.memory import placement_text

    plan = planned(program, gguf, replace(options, n_ctx=n_ctx or None))
    options, n_ctx, need = plan.options, plan.n_ctx, plan.need
    there = device_memory(options.executor)
    found: dict[str, Any] = {"n_ctx": n_ctx} | {name: getattr(need, name) for name in (*PARTS, "process", "total")}
    if need.in_file:
        found["in_file"] = need.in_file
    found |= {"available": system_memory().available, "runs_on": placement_text(need, options.executor)}
    if need.device is not None and need.where is not None and there is not None:
        of_device = {name: getattr(need.device, name) for name in (*PARTS, "total")}
        layers = {"layers": min(need.where.layers, need.where.n_layers), "n_layers": need.where.n_layers}
        found["device"] = {**of_device, "available": there.available, "is_own": there.is_own, **layers}
    return found


def _as_text(facts: dict[str, Any]) -> str:
    types = ", ".join(
        f"{name} {human_bytes(of['bytes'])} in {of['tensors']}" for name, of in facts["tensor_types"].items()
    )
    heads = f"{facts['n_heads']} heads, {facts['n_kv_heads'] or facts['n_heads']} of keys and values"
    tokenizer = facts["tokenizer"]
    template = facts["chat_template"] or f"none: {_without_template(facts.get('vectors'))}"
    if len(template) > TEMPLATE_SHOWN:
        template = template[:TEMPLATE_SHOWN] + f"... ({len(template)} characters; --template shows all)"
    rows: list[tuple[str, object]] = [
        ("model", facts["name"] or "-"),
        ("file", facts["path"]),
        ("architecture", facts["architecture"]),
        ("parameters", human_count(facts["n_params"])),
        ("size", f"{human_bytes(facts['size'])}, {facts['file_type']}"),
        ("types", types),
        ("layers", f"{facts['n_layers']} of width {facts['n_embd']}, {heads}"),
        ("context", f"{facts['context_length']} tokens"),
        ("tokenizer", f"{tokenizer['model']} ({tokenizer['pre'] or 'default'}), {tokenizer['n_vocab']} tokens"),
        ("sampling", ", ".join(f"{k} {v}" for k, v in facts["sampling"].items()) or "no recommendation"),
        ("licence", facts["licence"] or "-"),
        ("chat template", template),
    ]
    if facts["runnable"]:
        rows += _vector_rows(facts["vectors"])
        rows += _memory_rows(facts["memory"])
    else:
        rows.append(("cannot run", facts["reason"]))
    return fields(rows)


def _without_template(vectors: dict[str, Any] | None) -> str:
    """What a model is for that has no chat template."""
    if vectors is None or not (vectors["is_encoder"] or vectors["pooling"]):
        return "`run --raw` completes text"
    ranks = vectors["pooling"] == "rank"
    return "it gives scores to documents (rerank)" if ranks else "`edgellm embed` makes vectors of texts"


def _memory_rows(memory: dict[str, Any]) -> list[tuple[str, object]]:
    def sizes(of: dict[str, int]) -> str:
        rest = human_bytes(of["work"] + of.get("process", 0))
        return f"weights {human_bytes(of['weights'])}, cache {human_bytes(of['kv'])}, rest {rest}"

    total = f"{human_bytes(memory['total'])} with {memory['n_ctx']} tokens"
    free: list[tuple[str, object]] = [("free now", human_bytes(memory["available"]))]
    if "device" not in memory:
        rows: list[tuple[str, object]] = [("memory", f"{total} ({sizes(memory)})")]
        if in_file := memory.get("in_file", 0):
            least = human_bytes(memory["total"] - in_file)
            rows.append(("at least", f"{least}; {human_bytes(in_file)} of experts may stay on the disk"))
        return [*rows, *free]
    there = memory["device"]
    host = {name: memory[name] - there[name] for name in (*PARTS, "total")} | {"process": memory["process"]}
    shared = "" if there["is_own"] else ", the system's"
    return [
        ("runs on", memory["runs_on"]),
        ("memory", total),
        ("on the GPU", f"{human_bytes(there['total'])} ({sizes(there)})"),
        ("on the CPU", f"{human_bytes(host['total'])} ({sizes(host)})"),
        ("free on the GPU", f"{human_bytes(there['available'])}{shared}"),
        *free,
    ]


def _print_metadata(gguf: Any, as_json: bool) -> None:
    plain = {key: _plain(value) for key, value in gguf.metadata.items()}
    if as_json:
        echo(json_text(plain))
        return
    texts = ((key, str(value)) for key, value in plain.items())
    echo(fields((key, text if len(text) <= 200 else f"{text[:200]}...") for key, text in texts))


def _plain(value: Any) -> Any:
    """A metadata value as JSON knows it; a long list is named by its length."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list) and len(value) > 64:
        return f"[{len(value)} values]"
    return value
