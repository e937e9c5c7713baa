"""Chat templates of LLaDA's format in the variants that published checkpoints were trained with."""


def chat_template(start: str = "", after_header: str = "\n", after_image: str = "", after_turn: str = "\n") -> str:
    """A Jinja template in LLaDA's chat format, with what stands at the start, after a header, an image and a turn.

    Images stand where the message puts them; an assistant header is opened on request. `generation` marks what the
    assistant says: `return_assistant_tokens_mask` and training find the answers by it.
    """
    image = f"<img><IMG_CONTEXT></img>{after_image}"
    header = "<|start_header_id|>{}<|end_header_id|>{{{{ {!r} }}}}"
    return (
        "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
        f"{{% if part['type'] == 'image' %}}{{{{ {image!r} }}}}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}{% endif %}{% endmacro %}"
        + start
        + "{% for message in messages %}"
        + header.format("{{ message['role'] }}", after_header)
        + "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ body(message['content']) }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ body(message['content']) }}<|eot_id|>{% endif %}"
        f"{{{{ {after_turn!r} }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}" + header.format("assistant", after_header) + "{% endif %}"
    )
