"""A chat template of the most common kind: ChatML turns, tools as JSON, calls and reasoning between tags."""

TOOL_TEMPLATE = """\
{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- if tools or first %}<|im_start|>system
{% if first %}{{ first.content }}{% endif %}
{%- if tools %}

# Tools

You may call functions. They are described here:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>

For each call write its name and arguments as JSON between tags:
<tool_call>
{"name": <function-name>, "arguments": <arguments-object>}
</tool_call>
{%- endif %}<|im_end|>
{% endif -%}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- elif message.role == 'assistant' %}<|im_start|>assistant
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif not (first and loop.first) %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


def call_text(name: str, arguments: str) -> str:
    """What a model with this template writes to call a tool."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
