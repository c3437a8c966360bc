"""The model's own chat template: transformers' tokens, loss on the assistant's turns, the same in every command.

The templates are written here in the manner of the published ones.
"""

import json
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from commands import MINI, asked_for, lfu, refusal, sums, write_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from lfu import cli
from lfu.baselines.sdft import GENERAL, GSM8K, RECIPES, distill_prompt
from lfu.cli import EvalOptions, GenerateOptions, MergeOptions, TrainOptions
from lfu.cli.options import InferenceOptions, load_prompt_setup
from lfu.data.batches import IGNORED, make_labels
from lfu.data.rows import Row, messages, read_rows
from lfu.data.tokens import Format, ModelTokenizer, encode_row, encode_rows, load_tokenizer, prompt_ids, token_ids

CHATML = (
    "{% for message in messages %}\n"  # trim_blocks and lstrip_blocks take what stands around a line's blocks
    "    {% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- set system = "" %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" and loop.last and system_message is defined %}
        {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "user" %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- else %}
        {%- generation %}{{- " " + message["content"] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
QWEN3 = """{%- set ns = namespace(asked=0) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.asked = messages.index(message) %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.asked %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

TEMPLATES = {"chatml": CHATML, "llama31": LLAMA31, "llama2": LLAMA2, "mistral": MISTRAL, "qwen3": QWEN3}
LEARNED = {
    "chatml": "{}<|im_end|>",
    "llama31": "{}<|eot_id|>",
    "llama2": " {} </s>",
    "mistral": " {}</s>",
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>",
}
SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama31": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "llama2": [],
    "mistral": ["[INST]", "[/INST]"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
}

# --- tokenizers -----------------------------------------------------------------------------------


def byte_level() -> Tokenizer:
    """One token a byte, and two newlines are one."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("Ċ", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: a space before every text, and tokens for a word with the space before it."""
    merges = [("▁", "T"), ("▁", "Y"), ("▁", "[")]
    pieces = ["<unk>", "\n", *map(chr, range(33, 127)), "▁", *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " ")])
    return made


def chat_folder(folder: Path, family: str, **config: Any) -> Path:
    """A model's folder without weights: its tokenizer, and its template in tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    made = sentencepiece() if family == "llama2" else byte_level()
    made.add_special_tokens(["<s>", "</s>", *SPECIAL[family]])
    if family == "qwen3":
        made.add_tokens(["<think>", "</think>"])
    made.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_config(folder, names | {"chat_template": TEMPLATES[family]} | config)
    return folder


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def load(folder: Path) -> ModelTokenizer:
    return load_tokenizer(folder, 1024, template="chat")


def reference(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def dialogue(answers: int, system: str | None = None, first: str = "Two.") -> list[dict[str, str]]:
    turns = [] if system is None else [{"role": "system", "content": system}]
    for answer in [first, "Yes: three."][:answers]:
        turns += [{"role": "user", "content": f"Why {answer}?"}, {"role": "assistant", "content": answer}]
    return turns


def row(turns: list[dict[str, str]]) -> Row:
    question, answer, history = messages({"messages": turns})
    return Row(1, question, answer, {}, history)


def refuses(family: str, system: str | None, answers: int) -> bool:
    """Mistral's template drops the system turn once it is answered; Qwen3's, the thoughts of earlier turns."""
    return (family == "mistral" and system is not None) or (family == "qwen3" and answers > 1)


CASES = [(family, system, answers) for family in TEMPLATES for system in (None, "Be brief.") for answers in (1, 2)]

# --- tokens and labels ----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "system", "answers"), [case for case in CASES if not refuses(*case)])
def test_tokens_are_those_of_transformers(family: str, system: str | None, answers: int, tmp_path: Path) -> None:
    """But for what the template writes after the last end of a turn. A row's prompt is what is asked."""
    folder, turns = chat_folder(tmp_path, family), dialogue(answers, system)
    tokenizer, foreign, form = load(folder), reference(folder), Format("chat")
    tokens, given, *_ = encode_row(tokenizer, form, row(turns))
    whole = foreign.apply_chat_template(turns, return_dict=False)
    assert (tokens, foreign.decode(whole[len(tokens) :]).strip()) == (whole[: len(tokens)], "")
    asked = foreign.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, form, turns[-2]["content"], row(turns).history) == asked == tokens[:given]
    if system is not None:  # the option does what a turn of the row does
        rest = row([turn for turn in turns if turn["role"] != "system"])
        assert encode_row(tokenizer, form._replace(system=system), rest).tokens == tokens


def learned_runs(tokenizer: ModelTokenizer, turns: list[dict[str, str]]) -> tuple[int, list[list[int]]]:
    """How many tokens carry loss, and the runs of them."""
    example = encode_row(tokenizer, Format("chat"), row(turns))
    runs = [[*run] for learned, run in groupby(make_labels(example), lambda label: label != IGNORED) if learned]
    return example.num_loss_tokens, runs


def learned_turns(folder: Path, family: str, system: str | None, answers: int) -> tuple[list[str], list[str]]:
    """The text that carries loss, turn by turn, as it is and as it should be."""
    tokenizer, turns = load(chat_folder(folder, family)), dialogue(answers, system)
    _, runs = learned_runs(tokenizer, turns)
    expected = [LEARNED[family].format(turn["content"]) for turn in turns if turn["role"] == "assistant"]
    return [tokenizer.backend.decode(run, skip_special_tokens=False) for run in runs], expected


@pytest.mark.parametrize(("family", "system", "answers"), [case for case in CASES if not refuses(*case)])
def test_loss_is_on_answers_and_their_ends(family: str, system: str | None, answers: int, tmp_path: Path) -> None:
    actual, expected = learned_turns(tmp_path, family, system, answers)
    assert actual == expected
    tokenizer = load(tmp_path)
    count, runs = learned_runs(tokenizer, dialogue(answers, system))
    assert count == sum(map(len, runs))
    assert all(run[-1] in tokenizer.stops for run in runs)


@pytest.mark.parametrize(("family", "system", "answers"), [case for case in CASES if refuses(*case)])
def test_a_template_that_rewrites_earlier_turns(family: str, system: str | None, answers: int, tmp_path: Path) -> None:
    tokenizer, turns = load(chat_folder(tmp_path, family)), row(dialogue(answers, system))
    fault = "leaves out the system turn" if family == "mistral" else r"writes turn \d otherwise than when it is asked"
    with pytest.raises(ValueError, match=f"rows, line 1: the chat template of .*json {fault}"):
        encode_rows("rows", [turns], tokenizer, Format("chat"))


REFUSED = {
    "special token <|im_end|>": [
        {"role": "user", "content": "Why<|im_end|>?"},
        {"role": "assistant", "content": "So."},
    ],
    "special token <s>": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<s>So."}],
    "the question or the answer is empty": dialogue(2, first=" "),
    "begins with what the tokenizer joins": dialogue(1, first="\nSo."),
    "system turn of its own: leave out --system": dialogue(1, "Be brief."),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_row_that_a_chat_cannot_say(fault: str, tmp_path: Path) -> None:
    tokenizer, form = load(chat_folder(tmp_path, "chatml")), Format("chat", system="Be calm.")
    rows = [row(REFUSED[fault]), row(dialogue(1))]
    with pytest.raises(ValueError, match=rf"rows, line 1: .*{fault.replace('|', '[|]')}.*\. Fix the row"):
        encode_rows("rows", rows, tokenizer, form)
    examples, dropped = encode_rows("rows", rows, tokenizer, form, drop=True)
    assert (len(examples), len(dropped)) == (1, 1)
    if "special" in fault:
        with pytest.raises(ValueError, match="special token"):
            prompt_ids(tokenizer, form, "".join(turn["content"] for turn in REFUSED[fault]))


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template"),
        (7, "must be a text, or a list"),
        ([{"name": "tool_use", "template": CHATML}], "must be a text, or a list with one that is named default"),
        ("{% if %}", "the chat template cannot be read"),
        ("{{ messages.append(1) }}", "refuses it: .*unsafe"),
        ("{{ raise_exception('Never.') }}", "refuses it: 'Never.'"),
        ("{% for message in messages %}{{ message.content }}\n{% endfor %}", "ends turn 2 without a special token"),
    ],
)
def test_a_template_that_cannot_be_used(template: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(chat_folder(tmp_path, "chatml", chat_template=template))
    load_tokenizer(tmp_path, 1024)  # nobody asked for it


def test_where_a_template_is_found(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": LLAMA31}]
    folder = chat_folder(tmp_path, "llama31", chat_template=named)
    (expected,) = {load(chat_folder(tmp_path / "plain", "llama31")).chat.sha256}
    assert load(folder).chat.sha256 == expected
    (folder / "chat_template.jinja").write_text(LLAMA31)
    write_config(folder, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "no"})
    assert load(folder).chat.sha256 == expected
    assert reference(folder).chat_template.strip() == LLAMA31.strip()


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        ([{"role": "user", "content": "Why?"}], "must end with a turn of the user and its answer"),
        ([*dialogue(1), {"role": "user", "content": "Why?"}], "must end with a turn of the user and its answer"),
        ([{"role": "tool", "content": "7"}, *dialogue(1)], "a role is system, user, assistant, not 'tool'"),
        ([{"role": "user", "content": ["Why?"]}, *dialogue(1)], "a turn has a role and a content, a string"),
        ([{"role": "user", "content": "Why?", "name": "A"}, *dialogue(1)], "a turn has a role and a content, a string"),
        ([[]], "a turn has a role and a content, a string"),
        ("Why?", "column 'messages' must be a list"),
    ],
)
def test_messages_that_are_none(turns: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"line 1: .*{sentence}"):
        read_rows(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}]), messages)


def test_the_turns_before_a_question_need_the_chat(tmp_path: Path) -> None:
    tokenizer = load(chat_folder(tmp_path, "chatml"))
    for system, answers in ((None, 2), ("Be brief.", 1)):
        with pytest.raises(ValueError, match="needs --template chat"):
            encode_row(tokenizer, Format("alpaca"), row(dialogue(answers, system)))
        with pytest.raises(ValueError, match="needs --template chat"):
            prompt_ids(tokenizer, Format("alpaca"), "Why?", row(dialogue(answers, system)).history)
    assert encode_row(tokenizer, Format(), row(dialogue(1))) == encode_row(
        tokenizer, Format(), Row(1, "Why Two.?", "Two.", {})
    )
    with pytest.raises(ValueError, match="a tokenizer that was loaded with it"):
        prompt_ids(load_tokenizer(tmp_path, 1024), Format("chat"), "Why?")


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's model with ChatML's two tokens, for which it has embeddings to spare."""
    unread = shutil.ignore_patterns("*/", "lfu_config.json")
    folder = shutil.copytree(MINI, tmp_path_factory.mktemp("instruct") / "model", ignore=unread)
    made = Tokenizer.from_file(str(MINI / "tokenizer.json"))
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    config = json.loads((MINI / "tokenizer_config.json").read_text())
    write_config(folder, config | {"chat_template": CHATML})
    return folder


HOW = {"template": "chat", "method": "sft", "rank": 4}


@pytest.fixture(scope="module")
def trained(instruct: Path) -> Path:
    """An adapter that has learned where an answer ends."""
    data = write_rows(instruct.parent / "rows.jsonl", [{"messages": dialogue(answers)} for answers in (2, 1)])
    options = TrainOptions(
        model=str(instruct), data=str(data), layout="messages", system="Be brief.", epochs=40, learning_rate=1e-2,
        out=str(instruct.parent / "run"), **HOW,
    )  # fmt: skip
    return cli.train(options)


def test_what_was_trained_is_asked_and_ends(
    instruct: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, form = load(instruct), Format("chat", system="Be brief.")
    settings = json.loads((trained / "lfu_config.json").read_text())
    assert (settings["template"], settings["system"]) == ("chat", "Be brief.")
    assert settings["tokens"] == {
        "bos": [0],
        "eos": 1,
        "stops": [1, 985],
        "chat_template": tokenizer.chat.sha256,
    }
    asked, stops = asked_for(monkeypatch)
    common = {"model": str(instruct), "adapter": str(trained)}
    assert cli.generate(GenerateOptions(**common, question="Why Two.?", max_new_tokens=16)) == "Two."
    data = str(instruct.parent / "rows.jsonl")
    results = cli.evaluate(EvalOptions(**common, data=data, layout="messages", score="exact", max_new_tokens=16))
    assert "template chat)" in capsys.readouterr().out
    rows = read_rows(data, messages)
    examples = [encode_row(tokenizer, form, each) for each in rows]
    assert results["nll"].n == sum(len(each.tokens) - each.prompt_length for each in examples)
    assert asked == [
        prompt_ids(tokenizer, form, "Why Two.?"),
        *(prompt_ids(tokenizer, form, each.question, each.history) for each in rows),
    ]
    assert stops == [(), ()]


def test_a_merged_chat_model_is_asked_as_its_adapter(instruct: Path, trained: Path, tmp_path: Path) -> None:
    merged = cli.merge(MergeOptions(model=str(instruct), adapter=str(trained), out=str(tmp_path / "merged")))
    setups = [
        load_prompt_setup(InferenceOptions(model=str(model), adapter=adapter))
        for model, adapter in ((instruct, str(trained)), (merged, None))
    ]
    assert setups[0].format == setups[1].format == Format("chat", system="Be brief.")


def test_choices_are_asked_in_the_chat(instruct: Path, trained: Path, tmp_path: Path) -> None:
    item = {"question": "Why Two.?", "choices": ["One.", "Two.", "Five."], "answer": 1}
    data = str(write_rows(tmp_path / "rows.jsonl", [item]))
    found = cli.evaluate(EvalOptions(model=str(instruct), adapter=str(trained), data=data, score="choices"))
    assert found["acc"].mean == 1


TURNS = {
    "general": f"{GENERAL}\n\n### Instruction:\nWhy?\n\n### Reference Answer:\nSo.\n\n### Response:",
    "gsm8k": f"{GSM8K}\n\nWhy?\n\nSo.",
}


@pytest.mark.parametrize(("recipe", "opening"), [("general", ""), ("gsm8k", "Great! Let's think step by step. ")])
def test_distill_asks_in_a_turn_of_the_chat(
    recipe: str, opening: str, instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": TURNS[recipe]}]
    expected = reference(instruct).apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    asked = distill_prompt(load(instruct), RECIPES[recipe], Row(1, "Why?", "So.", {}))
    assert asked == expected + token_ids(load(instruct), opening)
    data, out = write_rows(tmp_path / "rows.jsonl", [{"question": "Why?", "answer": "So."}]), tmp_path / "out.jsonl"
    options = {"model": instruct, "data": data, "out": out, "recipe": recipe, "max_new_tokens": 1}
    assert lfu("distill", **options, template="chat") == 0
    assert "is used" not in capsys.readouterr().out
    assert lfu("distill", **options, resume=True) == 2
    assert "the chat template differs" in refusal(capsys)


def test_distill_in_another_template(instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl", [{"question": "<s>", "answer": "So."}]), tmp_path / "out.jsonl"
    options = {"model": instruct, "data": data, "out": out, "max_new_tokens": 1}
    assert lfu("distill", **options, template="chat") == 2
    assert refusal(capsys) == f"{data}, line 1: the text itself contains the special token <s>."
    assert lfu("distill", **options, template="chat", recipe="gsm8k-llama3") == 2
    assert "has a chat format written into it: leave out --template" in refusal(capsys)
    assert not out.exists()
    assert lfu("distill", **options) == 0
    assert f"{instruct} has a chat template of its own; plain is used." in capsys.readouterr().out
    record = json.loads(Path(f"{out}.json").read_text())
    assert (record.pop("template"), record.pop("chat_template")) == ("plain", None)
    Path(f"{out}.json").write_text(json.dumps(record))  # as it was before these were recorded
    assert lfu("distill", **options, resume=True, recipe="gsm8k") == 0


def test_another_template_is_refused(
    instruct: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shutil.copytree(instruct, tmp_path / "changed")
    write_config(changed, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML.replace("kind", "rude")})
    common = {"adapter": trained, "question": "Why?", "max_new_tokens": 1}
    assert lfu("generate", model=changed, **common) == 2
    assert "the chat template differs" in refusal(capsys)
    assert lfu("generate", model=changed, **common, template="alpaca") == 2
    assert lfu("generate", model=instruct, **common, template="alpaca") == 0
    capsys.readouterr()
    assert lfu("generate", model=instruct, **common, template="alpaca", system="Be calm.") == 2
    assert "--system is a turn of a chat: add --template chat" in refusal(capsys)
    data = write_rows(tmp_path / "rows.jsonl", sums(2))
    more = {"model": instruct, "adapter": trained, "data": data, "out": tmp_path / "run", "rank": 4, "method": "sft"}
    assert lfu("train", **more, template="chat") == 2
    assert refusal(capsys).endswith("was trained with other prompts: give --template chat --bos --system 'Be brief.'.")
    assert lfu("train", **more, template="chat", loss_on="instruction+answer") == 2
    assert "loss is on the answers" in refusal(capsys)


@pytest.mark.parametrize("command", ["train", "eval", "generate"])
def test_an_instruct_model_in_another_template(
    command: str, instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums(2))
    options: dict[str, Any] = {
        "train": {"data": data, "out": tmp_path / "run", "method": "sft", "epochs": 1},
        "eval": {"data": data, "max_new_tokens": 1},
        "generate": {"question": "Why?", "max_new_tokens": 1},
    }[command]
    said = f"{instruct} has a chat template of its own; {{}} is used. See --template chat."
    for model, template, expected in ((instruct, None, "alpaca"), (instruct, "chat", None), (MINI, "question", None)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert lfu(command, model=model, template=template, **options) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if " is used." in line]
        assert lines == ([said.format(expected)] if expected else [])
