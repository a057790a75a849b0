"""Chat templates of sixteen families of models, written down as the structure of what they write.

What is held is where turns begin and end, what is rewritten once a turn is past, and which tokens stand there; not their
wording of system prompts and tool lists.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tests.conftest import make_tokenizer
from trl.data.chat import ChatTemplate
from trl.data.messages import tidy_messages
from trl.data.tokens import TextEncoder

_LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
"""The index of the last question: reasoning before it is dropped."""
_THOUGHT = (
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content or '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
_CALLS_AS_JSON = (
    "{% for c in m.tool_calls or [] %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)


_MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class ChatFamily:
    """A template, the added tokens that it writes, and its EOS."""

    template: str
    tokens: tuple[str, ...]
    eos: str
    has_tools: bool = False

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"eos_token": self.eos, "additional_special_tokens": list(self.tokens)})
        tokenizer.chat_template = self.template
        return tokenizer


FAMILIES = {
    "qwen2": ChatFamily(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
        "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        + _CALLS_AS_JSON
        + "<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
        "<|im_end|>",
        has_tools=True,
    ),
    "qwen3": ChatFamily(
        _LAST_QUESTION
        + "{% for m in messages %}{% if m.role == 'assistant' %}"
        + _THOUGHT
        + "<|im_start|>assistant\n{% if loop.index0 > ns.last and (thought or loop.last) %}<think>\n{{ thought }}\n"
        "</think>\n\n{% endif %}{{ said }}"
        + _CALLS_AS_JSON
        + "<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n"
        "<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
        "<|im_end|>",
        has_tools=True,
    ),
    "llama3": ChatFamily(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
        "<|end_header_id|>\n\n{% if m.tool_calls %}{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}'
        "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        has_tools=True,
    ),
    "llama2": ChatFamily(
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.index0 == 1 %}<<SYS>>\n"
        "{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]{% elif m.role == 'assistant' %}"
        " {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        ("<s>",),
        "</s>",
    ),
    "mistral": ChatFamily(
        "{{ bos_token }}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{% if loop.index0 == ns.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
        "{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}]{{ eos_token }}'
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}"
        "[/TOOL_RESULTS]{% endif %}{% endfor %}",
        ("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "</s>",
        has_tools=True,
    ),
    "gemma": ChatFamily(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "</s>",
    ),
    "phi3": ChatFamily(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
    ),
    "deepseek_r1": ChatFamily(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ (m.content or '').split('</think>')[-1] }}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>"),
        "<｜end▁of▁sentence｜>",
    ),
    "glm": ChatFamily(
        _LAST_QUESTION
        + "[gMASK]<sop>{% for m in messages %}{% if m.role == 'assistant' %}"
        + _THOUGHT
        + "<|assistant|>\n{% if loop.index0 > ns.last and thought %}<think>{{ thought }}</think>{% else %}<think></think>"
        "{% endif %}{% if said %}{{ '\n' + said }}{% endif %}{% for c in m.tool_calls or [] %}{{ '\n' }}<tool_call>"
        "{{ c.function.name }}\n{{ c.function.arguments | tojson }}\n</tool_call>{% endfor %}{% elif m.role == 'tool' %}"
        "<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>{% else %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>", *_MARKUP),
        "<|endoftext|>",
        has_tools=True,
    ),
    "gpt_oss": ChatFamily(
        _LAST_QUESTION
        + "<|start|>system<|message|>You are helpful.<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% set later = namespace(answer=false) %}{% for o in messages[loop.index:] %}"
        "{% if o.role == 'assistant' and not o.tool_calls %}{% set later.answer = true %}{% endif %}{% endfor %}"
        "{% if m.tool_calls %}{% if m.reasoning_content and not later.answer %}<|start|>assistant<|channel|>analysis"
        "<|message|>{{ m.reasoning_content }}<|end|>{% endif %}<|start|>assistant to=functions."
        "{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% elif loop.last and not add_generation_prompt %}"
        "{% if m.reasoning_content %}<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% else %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% elif m.role == 'tool' %}"
        "<|start|>functions to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>{% elif m.role == 'system' %}"
        "<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>{% else %}<|start|>user<|message|>{{ m.content }}"
        "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>",
        has_tools=True,
    ),
    "command_r": ChatFamily(
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'user' %}<|USER_TOKEN|>"
        "{% elif m.role == 'assistant' %}<|CHATBOT_TOKEN|>{% else %}<|SYSTEM_TOKEN|>{% endif %}{{ m.content | trim }}"
        "<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "granite": ChatFamily(
        "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>You are helpful.<|end_of_text|>\n{% endif %}"
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>",
    ),
    "zephyr": ChatFamily(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        (),
        "</s>",
    ),
    "tulu": ChatFamily(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + eos_token }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        (),
        "</s>",
    ),
    "vicuna": ChatFamily(
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}A chat.{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ ' USER: ' + m.content | trim }}{% elif m.role == 'assistant' %}"
        "{{ ' ASSISTANT: ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        (),
        "</s>",
    ),
    "line_after_turns": ChatFamily(  # the line end stands after the generation prompt, and not before it
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}"
        "{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}{{ '\n' }}{% endfor %}",
        (),
        "</s>",
    ),
}


def render_chat(messages, tokenizer, **options):
    """Token ids [T] of a conversation, and the mask [T] of those that the assistant wrote."""
    text, spans = ChatTemplate(tokenizer, **options).assistant_spans(tidy_messages(messages))
    (ids,), (mask,) = TextEncoder(tokenizer).masked([text], [spans])
    return ids, mask
