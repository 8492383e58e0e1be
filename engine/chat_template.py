"""A model's chat template, rendered in a jinja sandbox as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from engine.errors import InvalidRequestError, ModelFileError

if TYPE_CHECKING:
    import jinja2

# For models that bring no template (base models). Our choice: the most widely trained layout.
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatTemplate:
    """Turns messages into the text that the model was trained on.

    Args:
        source: the jinja template; None uses ChatML.
        names: special tokens by role (``bos_token``, ``eos_token``), visible to the template.
    """

    def __init__(self, source: str | None, names: Mapping[str, str] | None = None) -> None:
        self.is_default = source is None
        self._source = source or _CHATML
        self._names = dict(names or {})

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text.

        A template that refuses a system message gets its text in front of the first user message.

        Raises:
            InvalidRequestError: the template refuses this order of roles.
            ModelFileError: the template is broken.
        """
        import jinja2

        try:
            return self._render(messages, add_generation_prompt)
        except jinja2.TemplateSyntaxError as error:
            raise ModelFileError("The model's chat template is broken; download the model again.") from error
        except jinja2.TemplateError as error:
            folded = _fold_system(messages)
            try:
                if folded is not None:
                    return self._render(folded, add_generation_prompt)
            except jinja2.TemplateError:
                pass  # the first complaint is the one that fits what was asked
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {str(error).rstrip('.')}."
            ) from error

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        return self._compiled.render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, documents=None,
            **self._names,
        )  # fmt: skip

    @cached_property
    def _compiled(self) -> jinja2.Template:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self._source)


def _fold_system(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]] | None:
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *(dict(message) for message in messages[2:])]


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
