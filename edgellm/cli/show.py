"""``edgellm show``: what a model is, and what it will need."""

from __future__ import annotations

from typing import Any

import click

from edgellm.cli.models import open_file
from edgellm.formats.errors import EdgeLLMError
from edgellm.machine.terminal import echo, fields, hand_over, human_bytes, human_count, json_text

TEMPLATE_SHOWN = 400  # characters


@click.command("show")
@click.argument("model", metavar="MODEL")
@click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(0), default=0, help="Context for the memory estimate.")
@click.option("--template", "whole_template", is_flag=True, help="Print the chat template and nothing else.")
@click.option("--metadata", is_flag=True, help="Print every metadata key of the file.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def command(model: str, n_ctx: int, whole_template: bool, metadata: bool, as_json: bool) -> None:
    """Show what a model is and what it will need.

    Architecture, size, types, context, tokenizer, chat template, recommended sampling, and memory.

    \b
    Examples:
      edgellm show smollm2
      edgellm show model.gguf -c 32768 --json
    """
    with open_file(model) as gguf:
        if whole_template:
            hand_over(f"{gguf.get('tokenizer.chat_template', str, '')}\n")
        elif metadata:
            _print_metadata(gguf, as_json)
        else:
            facts = model_facts(gguf, n_ctx)
            echo(json_text(facts) if as_json else _as_text(facts))


def model_facts(gguf: Any, n_ctx: int = 0) -> dict[str, Any]:
    """Everything that ``show`` knows of an open file, fit for JSON; ``n_ctx`` 0 takes the default context."""
    from edgellm.loading import LoadOptions, choose_context, memory_need
    from edgellm.machine.memory import system_memory
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
    try:
        program = build_program(gguf)
    except EdgeLLMError as error:
        return {**facts, "runnable": False, "reason": str(error)}
    n_ctx = n_ctx or choose_context(program, LoadOptions())
    need = memory_need(program, gguf, n_ctx, LoadOptions())
    parts = {name: getattr(need, name) for name in ("weights", "kv", "work", "process", "total")}
    facts["memory"] = {"n_ctx": n_ctx, **parts, "available": system_memory().available}
    return {**facts, "runnable": True, "reason": None}


def _as_text(facts: dict[str, Any]) -> str:
    types = ", ".join(
        f"{name} {human_bytes(of['bytes'])} in {of['tensors']}" for name, of in facts["tensor_types"].items()
    )
    heads = f"{facts['n_heads']} heads, {facts['n_kv_heads'] or facts['n_heads']} of keys and values"
    tokenizer = facts["tokenizer"]
    template = facts["chat_template"] or "none: `run --raw` completes text"
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
        memory = facts["memory"]
        parts = f"weights {human_bytes(memory['weights'])}, cache {human_bytes(memory['kv'])}, rest "
        parts += human_bytes(memory["work"] + memory["process"])
        rows.append(("memory", f"{human_bytes(memory['total'])} with {memory['n_ctx']} tokens ({parts})"))
        rows.append(("free now", human_bytes(memory["available"])))
    else:
        rows.append(("cannot run", facts["reason"]))
    return fields(rows)


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
