"""From a JSONL file to a batch: which tokens a model sees, which of them carry loss, and what is refused.

The tokenizer is built here, one token a byte and four merges, so that every expected token can be written down. The
merges sit exactly where a careless implementation would let a prompt grow into its answer.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lfu.data.batches import IGNORED, Example, collate, shuffled, split_by_length
from lfu.data.rows import Row, columns, read_rows
from lfu.data.tokens import (
    TEMPLATES,
    Format,
    ModelTokenizer,
    bos_ids,
    encode_row,
    encode_rows,
    load_tokenizer,
    prompt_ids,
)

PROMPTS = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhy?\n\n### Response:\n"
    ),
    "question": "Question: Why?\nAnswer:",
    "plain": "Why?",
}
"""What each template makes of the question "Why?"."""
ANSWERS = {"alpaca": "So.", "question": " So.", "plain": "So."}
PLAIN = Format("plain")

# The first row of GSM8K's train.jsonl, as published.
GSM8K = (
    r'{"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How '
    r'many clips did Natalia sell altogether in April and May?", "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in '
    r"May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
    r'"}'
)


def small_tokenizer(*, bos: bool) -> Tokenizer:
    """One token a byte, the merges a+b, newline+newline, newlines+#, :+newline, and <s> in front where `bos` is set."""
    merges = [("a", "b"), ("Ċ", "Ċ"), ("ĊĊ", "#"), (":", "Ċ")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<end>"])
    if bos:
        start = [("<s>", made.token_to_id("<s>"))]
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    return made


VOCABULARY = small_tokenizer(bos=True).get_vocab_size()
EOS, END = (small_tokenizer(bos=True).token_to_id(token) for token in ("</s>", "<end>"))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ModelTokenizer]:
    """Write a tokenizer and the given JSON files to a folder, and load them."""

    def load(bos: bool = True, made: Tokenizer | None = None, size: int = VOCABULARY, **files: Any) -> ModelTokenizer:
        (made or small_tokenizer(bos=bos)).save(str(tmp_path / "tokenizer.json"))
        for name, content in (files or {"tokenizer_config": {"eos_token": "</s>"}}).items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return load_tokenizer(tmp_path, size)

    return load


def small_model_tokenizer(*, bos: bool = True) -> ModelTokenizer:
    """The same without a folder."""
    made = small_tokenizer(bos=bos)
    return ModelTokenizer(made, made, bos_ids(made), EOS, frozenset({EOS}), VOCABULARY, Path("tokenizer.json"))


def spelled(tokenizer: ModelTokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.backend.id_to_token(token) for token in ids]


def text(tokenizer: ModelTokenizer, ids: list[int]) -> str:
    return tokenizer.backend.decode(ids, skip_special_tokens=False)


# --- tokens and labels ----------------------------------------------------------------------------


def text_of_a_row(template: str) -> tuple[list[str], list[str]]:
    """Prompt and answer as they are and as they should be."""
    tokenizer = small_model_tokenizer()
    tokens, prompt, *_ = encode_row(tokenizer, Format(template), Row(1, "Why?", "So.", {}))
    return [text(tokenizer, tokens[:prompt]), text(tokenizer, tokens[prompt:])], [
        "<s>" + PROMPTS[template],
        ANSWERS[template] + "</s>",
    ]


@pytest.mark.parametrize("template", PROMPTS)
def test_a_template_is_this_text_to_the_letter(template: str) -> None:
    actual, expected = text_of_a_row(template)
    assert actual == expected


def test_every_template_has_its_text_here() -> None:
    assert set(TEMPLATES) == set(PROMPTS)


STARTS = {(True, True): ["<s>"], (True, False): [], (False, True): [], (False, False): []}
"""What a row starts with, where (tokenizer, format) want BOS."""


def tokens_of_a_row(tokenizer_bos: bool, format_bos: bool) -> tuple[list[str], list[str]]:
    tokenizer = small_model_tokenizer(bos=tokenizer_bos)
    example = encode_row(tokenizer, Format("plain", bos=format_bos), Row(5, "Hi", "Yo", {}))
    return spelled(tokenizer, example.tokens), [*STARTS[tokenizer_bos, format_bos], "H", "i", "Y", "o", "</s>"]


@pytest.mark.parametrize(("tokenizer_bos", "format_bos"), STARTS)
def test_one_bos_where_tokenizer_and_format_want_it(
    load: Callable[..., ModelTokenizer], tokenizer_bos: bool, format_bos: bool
) -> None:
    actual, expected = tokens_of_a_row(tokenizer_bos, format_bos)
    assert actual == expected
    tokenizer = load(tokenizer_bos)
    assert tokenizer[2:6] == small_model_tokenizer(bos=tokenizer_bos)[2:6]  # bos, eos, stops, size
    example = encode_row(tokenizer, Format("plain", bos=format_bos), Row(5, "Hi", "Yo", {}))
    assert spelled(tokenizer, example.tokens) == expected
    assert example.prompt_length == len(expected) - 3
    assert example.num_loss_tokens == 3
    assert example.line_number == 5


def tokens_at_the_border() -> tuple[list[str], list[str]]:
    """Of a prompt and an answer that would merge."""
    tokenizer = small_model_tokenizer()
    return spelled(tokenizer, encode_row(tokenizer, PLAIN, Row(1, "a", "b", {})).tokens), ["<s>", "a", "b", "</s>"]


def test_prompt_and_answer_are_tokenised_apart() -> None:
    tokenizer = small_model_tokenizer()
    assert spelled(tokenizer, tokenizer.backend.encode("ab", add_special_tokens=False).ids) == ["ab"]
    actual, expected = tokens_at_the_border()
    assert actual == expected
    assert encode_row(tokenizer, PLAIN, Row(1, "a", "b", {})).prompt_length == 2


def tokens_between_pieces() -> tuple[list[str], list[str]]:
    """Around "Instruction": newlines that end a piece, and the # that begins the next."""
    tokenizer = small_model_tokenizer()
    tokens = spelled(tokenizer, encode_row(tokenizer, Format("alpaca"), Row(1, "Why?", "\nSo.", {})).tokens)
    end = tokens.index("I")  # of Instruction, the first capital I
    return tokens[end - 6 : end], [".", "ĊĊ", "#", "#", "#", "Ġ"]


def test_the_pieces_of_a_template_are_tokenised_apart() -> None:
    actual, expected = tokens_between_pieces()
    assert actual == expected
    tokenizer = small_model_tokenizer()
    tokens = spelled(tokenizer, encode_row(tokenizer, Format("alpaca"), Row(1, "Why?", "\nSo.", {})).tokens)
    assert tokens.count("ĊĊ#") == 1  # before Response, inside a piece; not before Instruction, between two
    assert tokens[tokens.index("ĊĊ") + 1] == "#"
    assert tokens[-6:] == [":Ċ", "Ċ", "S", "o", ".", "</s>"]  # the answer's newline does not join the prompt's


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", PROMPTS)
def test_generation_starts_from_the_tokens_of_training(
    load: Callable[..., ModelTokenizer], template: str, bos: bool
) -> None:
    tokenizer, format = load(), Format(template, bos)
    for question in ("Why?", "\n\n### a", "ab:\n", "{question}"):
        tokens, prompt, *_ = encode_row(tokenizer, format, Row(1, question, "b", {}))
        assert tokens[:prompt] == prompt_ids(tokenizer, format, question)


def test_braces_in_a_question_are_text(load: Callable[..., ModelTokenizer]) -> None:
    tokenizer = load()
    assert text(tokenizer, prompt_ids(tokenizer, Format("question"), "{question}{0}")) == (
        "<s>Question: {question}{0}\nAnswer:"
    )


def learned_tokens() -> tuple[list[list[str]], list[list[str]]]:
    """What carries loss in a batch of two rows of unequal length."""
    tokenizer = small_model_tokenizer()
    rows = [Row(1, "Hi", "Yo", {}), Row(2, "Hello", "a", {})]
    labels = collate([encode_row(tokenizer, PLAIN, row) for row in rows]).labels.tolist()
    learned = [spelled(tokenizer, [token for token in row if token != IGNORED]) for row in labels]
    return learned, [["Y", "o", "</s>"], ["a", "</s>"]]


def test_answer_and_eos_carry_loss_and_nothing_else_does() -> None:
    actual, expected = learned_tokens()
    assert actual == expected
    tokens, labels = collate([Example([5, 6, 7], 1, 1), Example([8, 9], 1, 2)])
    assert torch.equal(labels[labels != IGNORED], tokens[labels != IGNORED])


def test_an_unknown_template_is_refused(load: Callable[..., ModelTokenizer]) -> None:
    with pytest.raises(ValueError, match="no template 'llama'; there are alpaca, question, plain"):
        prompt_ids(load(), Format("llama"), "Why?")


# --- rows -----------------------------------------------------------------------------------------


def written(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_gsm8k_is_read_as_published(tmp_path: Path) -> None:
    (row,) = read_rows(written(tmp_path, GSM8K))
    assert row.number == 1
    assert row.question.startswith("Natalia sold clips to 48 of her friends in April, and then")
    assert row.answer.splitlines()[0] == "Natalia sold 48/2 = <<48/2=24>>24 clips in May."
    assert row.answer.endswith("\n#### 72")


def test_columns_can_be_chosen_and_all_fields_are_kept(tmp_path: Path) -> None:
    fields = {"prompt": "é\u2028?", "response": "So.", "level": 3}
    layout = partial(columns, question="prompt", answer="response")
    (row,) = read_rows(written(tmp_path, json.dumps(fields, ensure_ascii=False)), layout)
    assert row == Row(1, "é\u2028?", "So.", fields)


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, "", GSM8K, "  ", GSM8K))
    assert [row.number for row in rows] == [2, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Why?", "answer": "So.', "not valid JSON"),
        (r'{"question": "Why?", "answer": "So \ud83d"}', r"column 'answer' contains an unpaired surrogate, '\ud83d'"),
        (r'{"question": "Why?", "answer": "So.", "\ud83d": 1}', r"column '\ud83d' contains an unpaired surrogate"),
        ('["Why?", "So."]', "a row must be a JSON object, not list"),
        ('{"question": "Why?", "response": "So."}', "no column 'answer'; the row has 'question', 'response'"),
        ("{}", "no column 'question'; the row has none"),
        ('{"question": "Why?", "answer": 72}', "column 'answer' must be a string, not 72"),
        ('{"question": null, "answer": "So."}', "column 'question' must be a string, not None"),
        (
            '{"question": "Why?", "answer": "So.", "answer": "No."}',
            "not valid JSON (the name 'answer' stands in it twice)",
        ),
        (
            '{"question": "Why?", "answer": "So.", "meta": {"a": 1, "a": 2}}',
            "not valid JSON (the name 'a' stands in it",
        ),
        ('{"question": "Why?", "answer": "So.", "score": NaN}', "column 'score' contains NaN or infinity"),
        ('{"question": "Why?", "answer": "So.", "score": [1e999]}', "column 'score' contains NaN or infinity"),
        ('{"question": "Why?", "answer": ' + "[" * 10**5 + "]" * 10**5 + "}", "not valid JSON ("),
        ('{"question": "Why?", "answer": ' + "9" * 10**5 + "}", "not valid JSON ("),
        (
            r'{"question": "Why?", "\u001b[31manswer\n": 1}',
            r"no column 'answer'; the row has 'question', '\x1b[31manswer\n'",
        ),
    ],
)
def test_an_unusable_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path, GSM8K, "", line, GSM8K)
    with pytest.raises(ValueError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}, line 3: {message}")


@pytest.mark.parametrize(
    "fields",
    [
        {"question": list(range(10**5)), "answer": "So."},
        {"question": {"text": "a" * 10**5}, "answer": "So."},
        {f"column {number}": "So." for number in range(10**4)},
        {"a" * 10**5: "So."},
    ],
)
def test_what_a_row_holds_is_quoted_in_part(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = written(tmp_path, json.dumps(fields))
    with pytest.raises(ValueError, match="line 1: ") as error:
        read_rows(path)
    assert len(str(error.value)) < len(str(path)) + 250


@pytest.mark.parametrize("lines", [(), ("", " ")])
def test_a_file_without_rows_is_refused(tmp_path: Path, lines: tuple[str, ...]) -> None:
    path = written(tmp_path, *lines)
    with pytest.raises(ValueError) as error:
        read_rows(path)
    assert str(error.value) == f"{path} holds no rows."


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl does not exist"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "é", "answer": "a"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl is not UTF-8"):
        read_rows(path)


# --- rows that cannot be trained on ---------------------------------------------------------------

GOOD = Row(1, "Hi", "Yo", {})
FAULTS = [
    (Row(2, "  ", "Yo", {}), "the question or the answer is empty"),
    (Row(2, "Hi", "\n", {}), "the question or the answer is empty"),
    (Row(2, "Hi", "Hello", {}), "9 tokens are more than the maximum of 8"),
    (Row(2, "Hi", "\u200b\ufeff", {}), "the question or the answer is empty"),
    (Row(2, "Hi", "<s>", {}), "the text itself contains the special token <s>"),
    (Row(2, "Hi", "Yo</s>", {}), "the text itself contains the special token </s>"),
]


@pytest.mark.parametrize(("row", "fault"), FAULTS)
def test_a_faulty_row_is_named(load: Callable[..., ModelTokenizer], row: Row, fault: str) -> None:
    with pytest.raises(ValueError) as error:
        encode_rows("rows.jsonl", [GOOD, row], load(), PLAIN, max_length=8)
    assert str(error.value).startswith(f"rows.jsonl, line 2: {fault}.")


@pytest.mark.parametrize(("row", "fault"), FAULTS)
def test_drop_leaves_a_faulty_row_out_and_says_so(load: Callable[..., ModelTokenizer], row: Row, fault: str) -> None:
    later = Row(3, "Ho", "Yo", {})
    examples, dropped = encode_rows("rows.jsonl", [GOOD, row, later], load(), PLAIN, max_length=8, drop=True)
    assert [example.line_number for example in examples] == [1, 3]
    assert dropped == [f"line 2: {fault}"]


def test_the_longest_row_that_fits_is_kept_whole(load: Callable[..., ModelTokenizer]) -> None:
    tokenizer = load()
    (example,), dropped = encode_rows("rows.jsonl", [Row(1, "Hi", "Hell", {})], tokenizer, PLAIN, max_length=8)
    assert spelled(tokenizer, example.tokens) == ["<s>", "H", "i", "H", "e", "l", "l", "</s>"]
    assert dropped == []


def test_if_every_row_is_left_out_there_is_nothing_to_train_on(load: Callable[..., ModelTokenizer]) -> None:
    with pytest.raises(ValueError, match="no usable rows; line 1"):
        encode_rows("rows.jsonl", [GOOD], load(), PLAIN, max_length=3, drop=True)


def test_special_tokens_in_the_text_are_named_without_bos_too(load: Callable[..., ModelTokenizer]) -> None:
    with pytest.raises(ValueError, match="special token <s>"):
        encode_rows("rows.jsonl", [Row(2, "H<s>", "Yo", {})], load(), Format("question", bos=False))


def test_a_plain_prompt_is_the_users_own_special_tokens_and_all(load: Callable[..., ModelTokenizer]) -> None:
    tokenizer = load()
    (example,), _ = encode_rows("rows.jsonl", [Row(2, "<s>H</s><s>", "Yo", {})], tokenizer, PLAIN)
    assert spelled(tokenizer, example.tokens) == ["<s>", "H", "</s>", "<s>", "Y", "o", "</s>"]


def test_a_row_longer_than_the_model_was_made_for_is_named(load: Callable[..., ModelTokenizer]) -> None:
    with pytest.raises(ValueError, match=r"line 1: 6 tokens are more than the model's max_position_embeddings, 5\."):
        encode_rows("rows.jsonl", [GOOD], load(), PLAIN, positions=5)
    assert encode_rows("rows.jsonl", [GOOD], load(), PLAIN, positions=6)[1] == []


def test_no_rows_at_all(load: Callable[..., ModelTokenizer]) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl: no usable rows\."):
        encode_rows("rows.jsonl", [], load(), PLAIN)


# --- the tokenizer of a folder --------------------------------------------------------------------


def test_an_eos_the_tokenizer_does_not_know(load: Callable[..., ModelTokenizer]) -> None:
    with pytest.raises(ValueError, match=r"eos_token .</end>. is not in tokenizer\.json"):
        load(**{"tokenizer_config": {"eos_token": "</end>"}})


def test_bos_is_what_the_post_processor_puts_first(load: Callable[..., ModelTokenizer]) -> None:
    tokenizer = load(True)
    assert spelled(tokenizer, list(tokenizer.bos)) == ["<s>"]
    assert load(False).bos == ()


@pytest.mark.parametrize(
    ("files", "eos", "stops"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, EOS, {EOS}),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, EOS, {EOS}),
        ({"generation_config": {"eos_token_id": [END, EOS]}}, END, {END, EOS}),
        ({"config": {"eos_token_id": END}}, END, {END}),
        (
            {"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [END, EOS]}},
            EOS,
            {END, EOS},
        ),
        (
            {"tokenizer_config": {}, "generation_config": {"eos_token_id": EOS}, "config": {"eos_token_id": END}},
            EOS,
            {END, EOS},
        ),
    ],
)
def test_eos_is_found_wherever_a_folder_declares_it(
    load: Callable[..., ModelTokenizer], files: dict[str, Any], eos: int, stops: set[int]
) -> None:
    tokenizer = load(**files)
    assert tokenizer.eos == eos
    assert tokenizer.stops == stops


@pytest.mark.parametrize("declared", [{}, {"eos_token_id": VOCABULARY}, {"eos_token_id": -1}])
def test_a_folder_without_a_usable_eos_is_refused(
    load: Callable[..., ModelTokenizer], declared: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="no usable EOS token"):
        load(config=declared)


def test_a_token_that_the_model_does_not_have_is_refused_where_it_occurs(load: Callable[..., ModelTokenizer]) -> None:
    tokenizer = load(size=END)  # <end> is the last one
    assert len(encode_rows("rows.jsonl", [GOOD], tokenizer, PLAIN)[0]) == 1
    message = f"rows.jsonl, line 2: the text has the token id {END}, but the model's vocabulary holds {END}."
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_rows("rows.jsonl", [GOOD, Row(2, "<end>", "Yo", {})], tokenizer, PLAIN)


def test_truncation_and_padding_of_the_file_are_switched_off(load: Callable[..., ModelTokenizer]) -> None:
    made = small_tokenizer(bos=True)
    made.enable_truncation(4)
    made.enable_padding(length=64)
    tokenizer = load(made=made)
    assert spelled(tokenizer, prompt_ids(tokenizer, PLAIN, "Hello!")) == ["<s>", *"Hello!"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path, VOCABULARY)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path, VOCABULARY)


# --- batches --------------------------------------------------------------------------------------


ORDERS = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]


def all_orders_differ() -> bool:
    return len({tuple(shuffled(50, seed, epoch)) for seed, epoch in ORDERS}) == len(ORDERS)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    assert all_orders_differ()
    orders = {place: shuffled(50, *place) for place in ORDERS}
    torch.manual_seed(5)  # no state of any generator matters
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(50))
        assert order == shuffled(50, seed, epoch)


def rows_of_micro_batches() -> tuple[list[list[int]], list[list[int]]]:
    """Rows of similar length together, and none lost."""
    examples = [Example([0] * length, 1, row) for row, length in enumerate([9, 2, 5, 2, 8, 3, 7], 1)]
    parts = split_by_length(examples, 3)
    return [[example.line_number for example in part] for part in parts], [[2, 4, 6], [3, 7, 5], [1]]


def test_micro_batches_hold_rows_of_similar_length_and_lose_none() -> None:
    actual, expected = rows_of_micro_batches()
    assert actual == expected


def collated() -> tuple[list, list]:
    """Tokens up to each row's length, and labels, of three rows of unequal length."""
    batch = collate([Example([5, 6, 7], 1, 1), Example([8, 9], 1, 2), Example([4, 3, 2, 1], 3, 3)])
    tokens = [row[:length] for row, length in zip(batch.tokens.tolist(), (3, 2, 4))]
    return [*tokens, *batch.labels.tolist()], [
        [5, 6, 7],
        [8, 9],
        [4, 3, 2, 1],
        [IGNORED, 6, 7, IGNORED],
        [IGNORED, 9, IGNORED, IGNORED],
        [IGNORED, IGNORED, IGNORED, 1],
    ]


def test_collate_pads_on_the_right() -> None:
    actual, expected = collated()
    assert actual == expected
    batch = collate([Example([5, 6, 7], 1, 1), Example([8, 9], 1, 2)])
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.shape == (2, 3)


def supervised_and_predicted(prompt: int) -> tuple[int, int]:
    example = Example([5, 6, 7], prompt, 1)
    return example.num_loss_tokens, int((collate([example]).labels[:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_supervised_counts_the_labels_that_are_predicted(prompt: int) -> None:
    supervised, predicted = supervised_and_predicted(prompt)
    assert supervised == predicted
