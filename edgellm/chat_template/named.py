"""Chat templates by name, for model files that bring none; ``--chat-template NAME`` picks one.

Each row is written for this program from the published format of a model family: system, user and assistant text, no
tools. The tests compare every row with the family's own template.
"""

GENERATION = "{% if add_generation_prompt %}{{ %s }}{% endif %}"


def turns(turn: str, generation: str) -> str:
    """A template that prints ``turn`` for each message and ``generation`` (both Jinja expressions) at the end."""
    loop = (
        "{% for message in messages %}{% set role, text = message['role'], message['content'] %}{{ TURN }}{% endfor %}"
    )
    return loop.replace("TURN", turn) + GENERATION.replace("%s", generation)


def instructions(begin: str, middle: str, assistant: str, end: str, system: str, place: str = "first") -> str:
    """A template of the ``[INST]`` family: the system text stands inside one user turn, at ``place`` (first or last).

    All arguments are Jinja expressions; ``text`` is the message's, ``system`` may use ``system_text``.
    """
    return (
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system_text, chat = messages[0]['content'], messages[1:] %}"
        "{% else %}{% set system_text, chat = none, messages %}{% endif %}"
        "{% for message in chat %}{% set text = message['content'] %}"
        "{% if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
        "{{ raise_exception('after an optional system message the roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ " + begin + " }}"
        "{% if loop." + place + " and system_text is not none %}{{ " + system + " }}{% endif %}{{ " + middle + " }}"
        "{% else %}{{ " + assistant + " + " + end + " }}{% endif %}{% endfor %}"
    )


GEMMA_TURN = "'<start_of_turn>' + ('model' if role == 'assistant' else role) + '\\n' + text | trim + '<end_of_turn>\\n'"
GEMMA_NO_SYSTEM = (
    "{% if messages and messages[0]['role'] == 'system' %}{{ raise_exception('this format has no system message') }}"
    "{% endif %}"
)
DEEPSEEK3 = (
    "{{ bos_token }}{% for message in messages if message['role'] == 'system' %}{{ '\\n\\n' if not loop.first }}"
    "{{ message['content'] }}{% endfor %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}"
    "{% endfor %}" + GENERATION.replace("%s", "'<｜Assistant｜>'")
)
INST, END_INST = "'[INST] '", "text + '[/INST]'"

NAMED_TEMPLATES: dict[str, str] = {
    "chatml": turns("'<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n'", "'<|im_start|>assistant\\n'"),
    "llama2": instructions(
        begin="bos_token + '[INST] '",
        middle="(text | trim if not loop.first or system_text is none else text.rstrip()) + ' [/INST]'",
        assistant="' ' + text | trim",
        end="' ' + eos_token",
        system="'<<SYS>>\\n' + system_text + '\\n<</SYS>>\\n\\n'",
    ),
    "llama3": "{{ bos_token }}"
    + turns(
        "'<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + text | trim + '<|eot_id|>'",
        "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
    ),
    "gemma": "{{ bos_token }}" + GEMMA_NO_SYSTEM + turns(GEMMA_TURN, "'<start_of_turn>model\\n'"),
    "phi3": turns("'<|' + role + '|>\\n' + text + '<|end|>\\n'", "'<|assistant|>\\n'"),
    "zephyr": turns("'<|' + role + '|>\\n' + text + eos_token + '\\n'", "'<|assistant|>\\n'"),
    "deepseek3": DEEPSEEK3,
    "mistral-v1": "{{ bos_token }}"
    + instructions("' [INST] '", "text + ' [/INST]'", "' ' + text", "eos_token", "system_text + '\\n\\n'"),
    "mistral-v3": "{{ bos_token }}"
    + instructions(INST, END_INST, "' ' + text | trim", "eos_token", "system_text + '\\n\\n'", place="last"),
    "mistral-v3-tekken": "{{ bos_token }}"
    + instructions("'[INST]'", END_INST, "text", "eos_token", "system_text + '\\n\\n'", place="last"),
}
