"""Prompts -> token ids: with a chat template and without, exactly one BOS, nothing of the prompt lost."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from grpo.data import Dataset
from grpo.datasets.chat import PromptFormat, set_chat_template, tokenized, unused_template
from grpo.errors import InputError
from grpo.settings.config import load_config
from tests.conftest import make_tokenizer

CHATML = (
    "{% for message in messages %}({{ message['role'][0] }}){{ message['content'] | trim }}/{% endfor %}"
    "{% if add_generation_prompt %}(a){% endif %}"
)


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text(prompt: Any, setting: str = "auto", system_prompt: str | None = None, template: str = CHATML) -> str:
    return PromptFormat(chat_tokenizer(template), setting).text(prompt, system_prompt, place="x, line 7")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_a_text_becomes_the_users_one_message_and_the_answer_is_opened() -> None:
    assert text("1+1") == "(u)1+1/(a)"


def test_the_system_prompt_comes_first_unless_the_prompt_has_its_own() -> None:
    assert text("1+1", system_prompt="be") == "(s)be/(u)1+1/(a)"
    assert text([user("1+1")], system_prompt="be") == "(s)be/(u)1+1/(a)"
    own = [{"role": "system", "content": "mine"}, user("1+1")]
    assert text(own, system_prompt="be") == "(s)mine/(u)1+1/(a)"
    assert own[0]["content"] == "mine"
    assert len(own) == 2


def test_a_history_is_rendered_whole() -> None:
    assert text([user("a"), {"role": "assistant", "content": "b"}, user("c")]) == "(u)a/(a)b/(u)c/(a)"


def test_none_leaves_texts_as_they_are_though_the_tokenizer_has_a_template() -> None:
    assert text("1+1", "none") == "1+1"


def test_auto_without_a_template_leaves_texts_as_they_are() -> None:
    assert PromptFormat(make_tokenizer(), "auto").text("1+1") == "1+1"


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (PromptFormat(chat_tokenizer(), "none"), "none"),
        (PromptFormat(make_tokenizer(), "auto"), "auto, and the tokenizer has no template"),
    ],
)
def test_without_a_template_messages_and_system_prompts_are_refused(form: PromptFormat, why: str) -> None:
    with pytest.raises(InputError, match=f"x, line 7: messages need a chat template, but chat_template is {why}$"):
        form.text([user("1+1")], place="x, line 7")
    with pytest.raises(InputError, match=f"system_prompt: needs a chat template, but chat_template is {why}$"):
        form.text("1+1", "be")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "x, line 7: chat_template: the template leaves out what the user says"),
        ("{{ messages[-1]['content'] }}", "x, line 7: chat_template: the template leaves out what the system says"),
        ("{{ raise_exception('no system role') }}", "x, line 7: chat_template: cannot be applied: no system role"),
        ("{{ messages[5]['content'] }}", "x, line 7: chat_template: cannot be applied: "),
        ("{% if %}", "x, line 7: chat_template: cannot be applied: "),
    ],
)
def test_a_template_that_fails_or_drops_what_is_said_is_refused(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        text("1+1", system_prompt="be", template=template)


def test_the_setting_may_be_a_file_or_the_template_itself(tmp_path: Path) -> None:
    """A file is read once: what becomes of it later changes no run."""
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    configs = [load_config(None, [f"chat_template={setting}"]) for setting in (path, CHATML)]
    path.unlink()
    for config in configs:
        assert config.chat_template == CHATML
        tokenizer = make_tokenizer()
        set_chat_template(tokenizer, config.chat_template)
        assert PromptFormat(tokenizer, config.chat_template).text("1+1") == "(u)1+1/(a)"
        tokenizer.save_pretrained(tmp_path / "saved")
        assert type(tokenizer).from_pretrained(tmp_path / "saved").chat_template == CHATML
    with pytest.raises(
        InputError, match=r"chat_template: nowhere\.jinja: cannot be read: .*Use auto, none, a Jinja file"
    ):
        load_config(None, ["chat_template=nowhere.jinja"])


@pytest.mark.parametrize("setting", ["auto", "none"])
def test_auto_and_none_leave_the_tokenizer_alone(setting: str) -> None:
    tokenizer = chat_tokenizer()
    set_chat_template(tokenizer, setting)
    assert tokenizer.chat_template == CHATML


def test_a_template_that_is_left_aside_is_noticed_where_it_would_matter() -> None:
    assert unused_template(chat_tokenizer(), "none", "1+1")
    assert not unused_template(chat_tokenizer(), "auto", "1+1")
    assert not unused_template(chat_tokenizer("{{ messages[0]['content'] }}"), "none", "1+1")
    assert not unused_template(make_tokenizer(), "none", "1+1")


# Token ids


def bos_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One that puts <unk> before every text, as a Llama's does with <s>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    tokenizer.bos_token = "<unk>"
    tokenizer.chat_template = template
    assert tokenizer("1")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (None, "1+1"),
        (None, "<unk>1+1"),  # the text brings one along
        ("{{ bos_token }}" + CHATML, "1+1"),
        ("{{ bos_token }}{{ bos_token }}" + CHATML, "1+1"),
    ],
)
def test_double_bos(template: str | None, prompt: str) -> None:
    form = PromptFormat(bos_tokenizer(template), "auto")
    (ids,) = form.ids([form.text(prompt)])
    assert ids.count(form.tokenizer.bos_token_id) == 1
    assert ids[0] == form.tokenizer.bos_token_id


def test_a_rendered_chat_is_tokenized_as_transformers_does_it_in_one_go() -> None:
    tokenizer = bos_tokenizer("{{ bos_token }}" + CHATML)
    form = PromptFormat(tokenizer, "auto")
    whole = tokenizer.apply_chat_template([user("1+1")], add_generation_prompt=True)["input_ids"]
    assert form.ids([form.text("1+1")]) == [whole]


def test_a_rendered_chat_keeps_the_special_tokens_it_wrote_and_no_others() -> None:
    """A template without a BOS gets none: how a chat begins is for the template to say."""
    form = PromptFormat(bos_tokenizer(CHATML), "auto")
    (ids,) = form.ids([form.text("1+1")])
    assert form.tokenizer.bos_token_id not in ids


def dataset(*prompts: str) -> Dataset:
    return Dataset("x", [(f"x, line {number}", {"prompt": prompt}) for number, prompt in enumerate(prompts, start=1)])


def test_long_prompts_are_an_error_or_left_out_and_counted_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    form = PromptFormat(make_tokenizer())
    data = dataset("1+1", "12345", "abcdefgh", "7")
    with pytest.raises(InputError, match=r"x, line 3: the longest prompt has 8 tokens, max_prompt_length allows 4 \("):
        tokenized(data, form, max_prompt_length=4)
    kept = tokenized(data, form, max_prompt_length=4, drop_long=True)
    assert [sample["prompt"] for sample in kept] == ["1+1", "7"]
    assert kept.place(1) == "x, line 4"
    assert kept[1]["prompt_ids"] == form.tokenizer("7")["input_ids"]
    assert "x: 2 of 4 prompts have more than 4 tokens: left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="x: every prompt has more than"):
        tokenized(data, form, max_prompt_length=0, drop_long=True)


def test_the_system_prompt_of_a_sample_is_its_own() -> None:
    data = Dataset("x", [("1", {"prompt": "a", "system_prompt": "be"}), ("2", {"prompt": "b"})])
    form = PromptFormat(chat_tokenizer(), "auto")
    texts = [form.tokenizer.decode(sample["prompt_ids"]) for sample in tokenized(data, form, max_prompt_length=99)]
    assert texts == ["(s)be/(u)a/(a)", "(u)b/(a)"]


def test_a_prompt_without_tokens_is_named() -> None:
    with pytest.raises(InputError, match="x, line 2: the prompt has no tokens"):
        tokenized(dataset("1", ""), PromptFormat(make_tokenizer()), max_prompt_length=9)
