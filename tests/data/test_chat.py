"""Token ids: templates, the boundary of prompt and completion, BOS and EOS, limits."""

from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxpo.data.chat import Encoded, Encoder, Limits, Refused, fit, resolve_template
from jaxpo.data.files import Where
from jaxpo.data.formats import Preference
from jaxpo.data.record import Message
from jaxpo.data.templates import TEMPLATES
from jaxpo.data.tokenizer import load_tokenizer, train_tokenizer
from jaxpo.errors import UserError

WHERE = Where("rows.jsonl:", 7)
PROMPT: list[Message] = [{"role": "user", "content": "the cat"}]
CHAT = Preference(
    PROMPT,
    ([{"role": "assistant", "content": "sat"}], [{"role": "assistant", "content": "hello"}]),
)
# As Qwen3's: the answer is rendered with a thought that the generation prompt does not have.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma's newest: the generation prompt ends with a thought that the rendered answer does not have.
THOUGHTLESS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)


def word_tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A token per word, which puts BOS before and EOS after a text if asked to."""
    words = ["<s>", "</s>", "<unk>", *["the", "cat", "sat", "hello", "world"]]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def own(tokenizer: PreTrainedTokenizerFast) -> str:
    assert isinstance(tokenizer.chat_template, str)
    return tokenizer.chat_template


def encode(tokenizer: PreTrainedTokenizerFast, preference: Preference, template: str | None = None) -> Encoded:
    (encoded,) = Encoder(tokenizer, template)([(WHERE, preference)])
    assert isinstance(encoded, Encoded)
    return encoded


def test_a_completion_is_what_the_template_renders_after_the_generation_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoded = encode(tokenizer, CHAT, own(tokenizer))
    assert decode(tokenizer, encoded.prompt) == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert [decode(tokenizer, c) for c in encoded.completions] == ["sat<|im_end|>\n", "hello<|im_end|>\n"]
    assert encoded.lost == []


def test_what_the_template_adds_to_an_answer_belongs_to_the_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(tokenizer, CHAT, THINKING)
    assert decode(tokenizer, encoded.prompt).endswith("<|im_start|>assistant\n")
    assert decode(tokenizer, encoded.completions[0]) == "<think>\n\n</think>\n\nsat<|im_end|>\n"
    assert encoded.lost == []


def test_where_prompt_and_answer_part_early_the_prompt_loses_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(tokenizer, CHAT, THOUGHTLESS)
    assert decode(tokenizer, encoded.prompt).endswith("<|im_start|>assistant\n")
    assert decode(tokenizer, encoded.completions[0]) == "sat<|im_end|>\n"
    assert decode(tokenizer, encoded.lost) == "<think></think>"


def test_tokens_that_merge_across_the_boundary_go_to_the_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.encode(" cat")) == 1
    encoded = encode(tokenizer, Preference("the ", ("cat",)))
    assert decode(tokenizer, encoded.prompt) == "the"
    assert decode(tokenizer, encoded.completions[0]) == " cat<|im_end|>"
    assert decode(tokenizer, encoded.lost) == " "


def test_the_prompt_is_what_every_completion_shares(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(tokenizer, Preference("the ", ("cat", "  ")))
    assert decode(tokenizer, encoded.prompt) == "the"
    assert [decode(tokenizer, c) for c in encoded.completions] == [" cat<|im_end|>", "   <|im_end|>"]


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_gets_one_bos_where_the_tokenizer_adds_one_and_one_eos(bos: bool, eos: bool) -> None:
    tokenizer = word_tokenizer(bos=bos, eos=eos)
    start = [0] if bos else []
    for answer in ("sat", "sat </s>"):
        encoded = encode(tokenizer, Preference("the cat ", (answer,)))
        assert (encoded.prompt, encoded.completions) == ([*start, 3, 4], ([5, 1],))
    # Text that says BOS itself gets no second one.
    encoded = encode(tokenizer, Preference("<s> the cat ", ("sat",)))
    assert (encoded.prompt, encoded.completions) == ([0, 3, 4], ([5, 1],))


def test_a_template_that_writes_bos_gets_no_second_one() -> None:
    template = "{{ bos_token }}{% for m in messages %} {{ m.content }} {{ eos_token }}{% endfor %}"
    encoded = encode(word_tokenizer(bos=True), CHAT, template)
    assert (encoded.prompt, encoded.completions) == ([0, 3, 4, 1], ([5, 1], [6, 1]))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("text", ["hello world", "<s> hello world"])
def test_text_alone_follows_bos(bos: bool, text: str) -> None:
    encoded = encode(word_tokenizer(bos=bos), Preference("", (text,)))
    assert (encoded.prompt, encoded.completions) == ([0], ([6, 7, 1],))


def test_text_alone_without_a_bos_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    assert Encoder(tokenizer, None)([(WHERE, Preference("", ("hello",)))]) == [
        Refused("empty_prompt", "the tokenizer has no BOS token for a text to follow")
    ]


def test_pad_equal_to_eos_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    same = train_tokenizer(["the cat sat on the mat, and the dog said hello there"] * 20, 300, "chatml")
    same.pad_token = same.eos_token
    assert encode(same, CHAT, own(same)) == encode(tokenizer, CHAT, own(tokenizer))


def test_a_row_the_template_refuses_is_refused_in_its_words(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('System first!') }}{% endif %}"
    assert Encoder(tokenizer, template)([(WHERE, CHAT)]) == [Refused("template_refused", "System first!")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"rows\.jsonl:7 holds messages, .*data\.chat_template: a file, or one of chatml"),
        ("{% for m in messages %}", "is no valid Jinja: line 1"),
        ("{{ messages[0].nothing.at_all }}", r"rows\.jsonl:7: the chat template fails on this row: "),
    ],
)
def test_a_template_that_does_not_work_is_the_users_to_mend(
    tokenizer: PreTrainedTokenizerFast, template: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Encoder(tokenizer, template)([(WHERE, CHAT)])


def test_plain_text_needs_an_eos() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        Encoder(tokenizer, None)([(WHERE, Preference("the", ("cat",)))])


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{{ strftime_now('%d %b %Y, %-m/%y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text = Encoder(tokenizer, template).render([{"role": "user", "content": "!"}], "", add_generation_prompt=True)
    assert text == "26 Jul 2024, 7/24!"


def test_tools_reach_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "cat", "description": "", "parameters": {}}}
    template = "{% for t in tools %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    preference = Preference(CHAT.prompt, CHAT.completions, {"tools": [tool]})
    assert decode(tokenizer, encode(tokenizer, preference, template).prompt).startswith("catthe")


def test_templates_come_from_the_config_or_the_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert resolve_template(tokenizer, None) == tokenizer.chat_template == TEMPLATES["chatml"].source
    assert resolve_template(tokenizer, "zephyr") == TEMPLATES["zephyr"].source
    (tmp_path / "mine.txt").write_text("mine")
    assert resolve_template(tokenizer, str(tmp_path / "mine.txt")) == "mine"
    assert resolve_template(word_tokenizer(), None) is None
    several = word_tokenizer()
    several.chat_template = {"default": "a", "tool_use": "b"}  # pyright: ignore[reportAttributeAccessIssue]
    assert resolve_template(several, None) == "a"
    several.chat_template = {"rag": "a", "tool_use": "b"}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\)"):
        resolve_template(several, None)


def test_an_unknown_template_names_the_nearest(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data\.chat_template is 'chatlm', .* Did you mean chatml\?"):
        resolve_template(tokenizer, "chatlm")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match=r"binary\.jinja cannot be read as text"):
        resolve_template(tokenizer, str(tmp_path / "binary.jinja"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates_end_an_answer_with_eos_and_share_the_prompt(name: str) -> None:
    tokenizer = train_tokenizer(["the cat sat"], 300, name)
    preference = Preference([{"role": "system", "content": "be"}, *PROMPT], CHAT.completions)
    encoded = encode(tokenizer, preference, own(tokenizer))
    assert encoded.lost == []
    for completion, answer in zip(encoded.completions, ("sat", "hello"), strict=True):
        assert decode(tokenizer, completion).startswith(answer)
        assert tokenizer.eos_token_id in completion[-4:]
    assert decode(tokenizer, encoded.prompt).count(str(tokenizer.bos_token)) <= 1


CONTENTS = ["", " ", "\n", "a", " a", "\n\na", "中文", "a<|im_end|>b", "<|im_end|>\n", "<|im_start|>", "  x  "]


def assert_as_tokenised_whole(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """What the texts of a row begin with is tokenised once; the result must be that of every text tokenised whole."""
    encoder = Encoder(tokenizer, TEMPLATES["chatml"].source)
    prompts = [[{"role": "user", "content": content}] for content in CONTENTS]
    answers = [[{"role": "assistant", "content": content}] for content in CONTENTS]
    rows = [(prompt, pair) for prompt in prompts for pair in pairwise(answers)]
    encoded = encoder([(WHERE, Preference(prompt, pair)) for prompt, pair in rows])
    for (prompt, pair), result in zip(rows, encoded, strict=True):
        assert isinstance(result, Encoded)
        for answer, completion in zip(pair, result.completions, strict=True):
            text = encoder.render([*prompt, *answer], WHERE, add_generation_prompt=False)
            assert result.prompt + completion == tokenizer.encode(text, add_special_tokens=False)
    return encoder


def test_a_shared_prompt_is_tokenised_once_with_the_same_result(shared: Path) -> None:
    encoder = assert_as_tokenised_whole(load_tokenizer(str(shared / "models/smollm2-135m-instruct")))
    assert encoder._cut(["<|im_start|>user\na", "<|im_start|>user\nab"]) == len("<|im_start|>")


def test_a_tokenizer_that_marks_the_beginning_of_a_text_tokenises_it_whole() -> None:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    texts = [*CONTENTS, "user\nassistant", "a b c a b"] * 5
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    encoder = assert_as_tokenised_whole(tokenizer)
    assert encoder._cut(["<|im_start|>user\na", "<|im_start|>user\nab"]) == 0


FIVE, THREE = [1, 2, 3, 4, 5], [7, 8, 9]


@pytest.mark.parametrize(
    ("limits", "prompt", "completions", "prompt_cut", "completions_cut"),
    [
        (Limits(8, None, "left"), FIVE, (THREE, [6]), False, 0),
        (Limits(7, None, "left"), FIVE, ([7, 8], [6]), False, 1),
        (Limits(6, None, "left"), FIVE, ([7], [6]), False, 1),
        (Limits(5, None, "left"), FIVE, ([], []), False, 2),
        (Limits(3, None, "left"), FIVE, ([], []), False, 2),
        (Limits(8, 5, "left"), FIVE, (THREE, [6]), False, 0),
        (Limits(8, 3, "left"), [3, 4, 5], (THREE, [6]), True, 0),
        (Limits(8, 3, "right"), [1, 2, 3], (THREE, [6]), True, 0),
        (Limits(5, 3, "left"), [3, 4, 5], ([7, 8], [6]), True, 1),
    ],
)
def test_limits(
    limits: Limits, prompt: list[int], completions: tuple[list[int], ...], prompt_cut: bool, completions_cut: int
) -> None:
    fitted = fit(Encoded(FIVE, (THREE, [6]), []), limits)
    assert (fitted.prompt, fitted.completions) == (prompt, completions)
    assert (fitted.prompt_cut, fitted.completions_cut) == (prompt_cut, completions_cut)
