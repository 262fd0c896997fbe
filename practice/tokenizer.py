"""The practice model's tokenizer: byte-level BPE over the corpus, and a chat template that ends every turn."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from practice.corpus import Message

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
_ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

# Every piece of the template is a token of its own, so that a prompt's tokens are a prefix of the conversation's.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{%- if role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + role) -}}"
    "{%- endif -%}"
    "{{- '<|' + role + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(
    conversations: Iterable[Sequence[Message]], *, vocabulary: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE with `vocabulary` entries, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD_TOKEN, END_TOKEN, *_ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for c in conversations for m in c), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=list(_ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def tokens_to_learn(
    tokenizer: PreTrainedTokenizerFast, conversation: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Tokenise a conversation, and mark the tokens the model must learn: the assistant's words and ends of turn."""
    tokens: list[int] = []
    learned: list[bool] = []
    for message in conversation:
        head = [int(tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"))]
        body = [*tokenizer.encode(message["content"], add_special_tokens=False), int(tokenizer.eos_token_id)]
        tokens += head + body
        learned += [False] * len(head) + [message["role"] == "assistant"] * len(body)
    return tokens, learned
