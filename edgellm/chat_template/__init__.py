"""Turn messages into prompt text with the model's own Jinja template, and know which characters a user wrote.

The template comes with the model file, so it is an untrusted program: it runs in jinja2's immutable sandbox with the
functions that Hugging Face gives templates, under a budget of steps, bytes and time. The text is that of transformers'
``apply_chat_template``, byte for byte; on top of it every character is marked as the template's or the user's, so that
text of a user never becomes a control token.
"""

from edgellm.chat_template.messages import Message
from edgellm.chat_template.named import NAMED_TEMPLATES
from edgellm.chat_template.template import ChatTemplate
from edgellm.chat_template.user_text import Segment

__all__ = ["NAMED_TEMPLATES", "ChatTemplate", "Message", "Segment"]
