"""Decoding in batches, greedy or drawn, gives every prompt the tokens it would get alone, by any slower road.

All in float64, where no two logits tie. Each of the 80 tokens of the toy tokenizer is spelled by a letter and a digit,
A0 to H9, so any token can serve as the end of an answer, and a stop string can begin and end inside a token.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, random_lora, random_params, random_tokens
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from lfu import generate as module
from lfu.data.tokens import ModelTokenizer
from lfu.errors import InputError
from lfu.generate import Completion, distribution, generate, make_sampler
from lfu.lora import Adapter
from lfu.model import Config, Params, forward, load

KINDS = ("llama31", "mistral_v01", "qwen3_untied")
"""Scaled rotation, a sliding window, and norms on queries and keys: whatever depends on a token's position."""
VOCABULARY = 80
NEW = 24
LENGTHS = (30, 1, 7, 64, 12, 7, 3, 21, 5, 40, 2)
"""Prompts shorter and longer than the window and the original context; more of them than fill the cache together."""


def spelled(tokens: Sequence[int]) -> str:
    return "".join(f"{'ABCDEFGH'[token // 10]}{token % 10}" for token in tokens)


def tokenizer(stops: Collection[int] = ()) -> ModelTokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={spelled([token]): token for token in range(VOCABULARY)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return ModelTokenizer(
        tokenizer, tokenizer, (), max(stops, default=0), frozenset(stops), VOCABULARY, Path("tokenizer.json")
    )


@pytest.fixture(params=KINDS)
def some_model(request: pytest.FixtureRequest) -> tuple[Config, Params]:
    return model_of(request.param)


@pytest.fixture
def model() -> tuple[Config, Params]:
    return model_of("llama31")


@cache
def model_of(kind: str) -> tuple[Config, Params]:
    return CONFIGS[kind], random_params(CONFIGS[kind], seed=5)


def prompts_for(config: Config) -> list[list[int]]:
    return [random_tokens(config, length, seed=index).tolist() for index, length in enumerate(LENGTHS)]


def uncached(
    config: Config, params: Params, prompt: Sequence[int], adapters: Sequence[Adapter] = (), new: int = NEW
) -> list[int]:
    """Greedy decoding as it is defined: the whole sequence through the model for each next token."""
    tokens = list(prompt)
    for _ in range(new):
        logits, _ = forward(config, params, torch.tensor([tokens]), adapters)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def until(tokens: list[int], stops: Collection[int]) -> Completion:
    """The completion that these tokens make when generation ends at the first of `stops`."""
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    kept = tokens[:end]
    return Completion(spelled(kept), kept, end is not None)


def completions(*arguments: Any, **options: Any) -> list[Completion]:
    """The completions in the order of the prompts."""
    pairs = list(generate(*arguments, **{"max_new_tokens": NEW} | options))
    assert sorted(index for index, _ in pairs) == list(range(len(pairs)))
    return [completion for _, completion in sorted(pairs)]


# --- the tokens -----------------------------------------------------------------------------------


Pair = tuple[list[Completion], list[Completion]]
"""Completions as they are and as they should be."""


def batched_and_uncached(kind: str) -> Pair:
    config, params = model_of(kind)
    return completions(config, params, tokenizer(), prompts_for(config)), [
        until(tokens, ()) for tokens in free_runs(kind)
    ]


@cache
def free_runs(kind: str) -> list[list[int]]:
    """What follows each prompt, one token after the other and without a cache."""
    config, params = model_of(kind)
    return [uncached(config, params, prompt) for prompt in prompts_for(config)]


@pytest.mark.parametrize("kind", [*KINDS, "qwen2"])
def test_batched_is_one_by_one_is_uncached(kind: str) -> None:
    actual, expected = batched_and_uncached(kind)
    assert actual == expected
    config, params = model_of(kind)
    assert completions(config, params, tokenizer(), prompts_for(config), batch_size=1) == expected
    assert len({completion.text for completion in expected}) == len(LENGTHS)  # no two prompts could be mixed up


def stopping_and_expected(kind: str) -> Pair:
    """With four EOS ids, which rows of a batch reach at different times, if at all."""
    config, params = model_of(kind)
    free = free_runs(kind)
    stops = {free[0][5], free[2][9], free[4][2], free[6][1]}
    return completions(config, params, tokenizer(stops), prompts_for(config)), [until(tokens, stops) for tokens in free]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_leave_the_batch_and_the_others_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = stopping_and_expected(kind)
    lengths = {len(completion.tokens) for completion in expected}
    assert len(lengths) > 3
    assert {completion.finished for completion in expected} == {True, False}

    sizes, decode = [], module.decode

    def noting(config: Config, params: Params, tokens: Tensor, *rest: Any) -> Any:
        if tokens.shape[1] == 1:  # not a prompt
            sizes.append(len(tokens))
        return decode(config, params, tokens, *rest)

    monkeypatch.setattr(module, "decode", noting)
    assert stopping_and_expected(kind)[0] == expected
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= len(LENGTHS) // 2


@pytest.mark.parametrize("kind", [*KINDS, "qwen2"])
def test_transformers_generates_the_same(kind: str, folder_of: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        folder_of(kind), dtype=torch.float64, attn_implementation="eager"
    ).eval()
    config, params = load(folder_of(kind), dtype=torch.float64)
    prompts = prompts_for(config)
    stops = {uncached(config, params, prompts[0])[4], uncached(config, params, prompts[3])[8]}
    for prompt, completion in zip(prompts, completions(config, params, tokenizer(stops), prompts), strict=True):
        tokens = torch.tensor([prompt])
        (row,) = reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW,
            eos_token_id=sorted(stops), pad_token_id=0,
        )  # fmt: skip
        assert until(row[len(prompt) :].tolist(), stops) == completion


def test_logits_that_are_not_finite_choose_nothing(model: tuple[Config, Params]) -> None:
    config, params = model
    spoilt = params._replace(embed=params.embed.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(InputError, match="logits for prompt 2 are not finite"):
        completions(config, spoilt, tokenizer(), [[1, 2], [3, 4]])


def test_adapters_take_part(model: tuple[Config, Params]) -> None:
    config, params = model
    prompts = prompts_for(config)
    adapters = [(random_lora(config, 2, seed=1), 2.0), (random_lora(config, 3, seed=2, targets=("v_proj",)), 0.5)]
    expected = [until(uncached(config, params, prompt, adapters), ()) for prompt in prompts]
    assert completions(config, params, tokenizer(), prompts, adapters) == expected
    assert completions(config, params, tokenizer(), prompts, adapters[:1]) != expected
    assert completions(config, params, tokenizer(), prompts) != expected


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8, 9, 100])
def test_each_completion_comes_with_the_index_of_its_prompt(model: tuple[Config, Params], batch_size: int) -> None:
    config, params = model
    prompts = prompts_for(config)
    pairs = list(generate(config, params, tokenizer(), prompts, max_new_tokens=4, batch_size=batch_size))
    lengths = [len(prompts[index]) for index, _ in pairs]
    assert lengths == sorted(LENGTHS)  # prompts of similar length share a batch
    assert sorted(pairs) == [
        (index, until(uncached(config, params, prompt, new=4), ())) for index, prompt in enumerate(prompts)
    ]


def test_a_batch_is_handed_over_before_the_next_one_begins(
    model: tuple[Config, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, continued = [], module.decode_batch

    def noting(
        config: Config, params: Params, tokenizer: ModelTokenizer, prompts: dict[int, Any], *rest: Any
    ) -> dict[int, Any]:
        begun.append(len(prompts))
        return continued(config, params, tokenizer, prompts, *rest)

    monkeypatch.setattr(module, "decode_batch", noting)
    config, params = model
    answers = generate(config, params, tokenizer(), prompts_for(config), max_new_tokens=2, batch_size=3)
    assert len(list(islice(answers, 3))) == 3
    assert begun == [3]
    assert len(list(answers)) == 8
    assert begun == [3, 3, 3, 2]


# --- where an answer ends -------------------------------------------------------------------------


def free_run(model: tuple[Config, Params]) -> tuple[list[int], list[int]]:
    """A prompt, and the NEW tokens after it, of which the first eight are all different."""
    config, params = model
    for seed in range(100):
        prompt = random_tokens(config, 10, seed=seed).tolist()
        tokens = uncached(config, params, prompt)
        if len(set(tokens[:8])) == 8:
            return prompt, tokens
    raise AssertionError("The model only repeats itself.")


@cache
def eight() -> tuple[list[int], list[int]]:
    return free_run(model_of("llama31"))


def completed(stops: Collection[int] = (), **options: Any) -> Completion:
    """What `generate` makes of the prompt of `eight`."""
    prompt, _ = eight()
    (completion,) = completions(*model_of("llama31"), tokenizer(stops), [prompt], **options)
    return completion


def ended_by_eos(*places: int) -> tuple[Completion, Completion]:
    """Where the tokens at these places are EOS ids, as it is and as it should be."""
    _, tokens = eight()
    kept = tokens[: min(places)]
    return completed([tokens[place] for place in places]), Completion(spelled(kept), kept, True)


@pytest.mark.parametrize("places", [(6,), (6, 3), (0, 3)])
def test_any_eos_id_ends_an_answer_and_stays_out_of_it(places: tuple[int, ...]) -> None:
    actual, expected = ended_by_eos(*places)
    assert actual == expected


def within_budget(budget: int) -> tuple[Completion, Completion]:
    """The EOS takes up one of the new tokens: it stands at place 7 here, and only a budget of 7 reaches it."""
    _, tokens = eight()
    kept = tokens[: min(budget, 6)]
    return completed({tokens[6]}, max_new_tokens=budget), Completion(spelled(kept), kept, budget == 7)


@pytest.mark.parametrize("budget", [0, 1, 6, 7])
def test_no_more_than_max_new_tokens(budget: int) -> None:
    actual, expected = within_budget(budget)
    assert actual == expected


def cut_at_a_stop_string(start: int, end: int) -> tuple[Completion, Completion]:
    """Where the characters from `start` to `end` of the answer are a stop string."""
    _, tokens = eight()
    text = spelled(tokens)
    stop = text[start:end]
    reached = (text.index(stop) + len(stop) + 1) // 2  # two characters a token
    return completed(stop=("nowhere", stop)), Completion(text[: text.index(stop)], tokens[:reached], True)


@pytest.mark.parametrize(("start", "end"), [(4, 6), (4, 8), (5, 8), (5, 7), (5, 6), (0, 3)])
def test_a_stop_string_is_cut_off_wherever_token_borders_lie(start: int, end: int) -> None:
    actual, expected = cut_at_a_stop_string(start, end)
    assert actual == expected


def cut_at_the_first_of_two() -> tuple[Completion, Completion]:
    """Both stop strings are complete with the same token; the second of them begins earlier."""
    _, tokens = eight()
    text = spelled(tokens)
    return completed(stop=(text[6:8], text[5:8])), Completion(text[:5], tokens[:4], True)


def test_the_first_stop_string_in_the_text_counts() -> None:
    actual, expected = cut_at_the_first_of_two()
    assert actual == expected


def test_half_a_stop_string_is_text(model: tuple[Config, Params]) -> None:
    prompt, tokens = free_run(model)
    (completion,) = completions(*model, tokenizer(), [prompt], stop=(spelled(tokens[2:5]),), max_new_tokens=4)
    assert completion == Completion(spelled(tokens[:4]), tokens[:4], False)


def test_stop_strings_end_rows_of_a_batch_one_by_one(model: tuple[Config, Params]) -> None:
    config, params = model
    prompts = prompts_for(config)
    free = [uncached(config, params, prompt) for prompt in prompts]
    stops = [spelled(free[row][place : place + 2])[1:3] for row, place in [(0, 5), (3, 2), (6, 9)]]
    texts = [spelled(tokens) for tokens in free]
    cuts = [min((text.index(stop) for stop in stops if stop in text), default=None) for text in texts]
    assert len(set(cuts)) > 3
    found = completions(config, params, tokenizer(), prompts, stop=stops)
    assert [completion.text for completion in found] == [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    assert [completion.finished for completion in found] == [cut is not None for cut in cuts]
    assert found == completions(config, params, tokenizer(), prompts, stop=stops, batch_size=1)


# --- drawing --------------------------------------------------------------------------------------

TEMPERATURE, TOP_K, TOP_P = 0.7, 12, 0.8
PUBLISHED = (0.95, 50, 0.7)
SETTINGS = [
    (TEMPERATURE, TOP_K, TOP_P),
    PUBLISHED,
    (2.0, VOCABULARY, 0.99),
    (1.0, VOCABULARY, 1.0),
    (0.3, 1, 0.5),
    (1, 500, 0.01),
]
WARPED = 2e-15  # measured: 2.2e-16
DRAWN = 20000
DEVIATION = 0.0106  # three standard errors of a frequency near 1/2; measured: 0.0072


def some_logits(rows: int = 64) -> Tensor:
    return 3 * torch.randn(rows, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def warped(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What transformers draws from."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(float(temperature)), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
    return LogitsProcessorList(warpers)(None, logits).softmax(-1)


def warper_error(*settings: tuple[float, int, float]) -> float:
    """The largest difference of a probability."""
    logits = some_logits()
    each = settings or ((TEMPERATURE, TOP_K, TOP_P),)
    return max(float((distribution(logits, *how) - warped(logits, *how)).abs().max()) for how in each)


def test_what_is_drawn_from_is_transformers_distribution() -> None:
    assert warper_error(*SETTINGS) < WARPED
    for how in SETTINGS:
        ours, theirs = distribution(some_logits(), *how), warped(some_logits(), *how)
        assert torch.equal(ours > 0, theirs > 0)
    kept = (distribution(some_logits(), TEMPERATURE, TOP_K, TOP_P) > 0).sum(-1)
    assert 1 < int(kept.max()) < TOP_K  # both limits were at work
    assert int((distribution(some_logits(), TEMPERATURE, TOP_K, 1.0) > 0).sum(-1).max()) == TOP_K


def test_the_generation_config_of_transformers_warps_in_this_order() -> None:
    """As `generate(do_sample=True)` assembles it."""
    from tiny import reference_model
    from transformers import GenerationConfig

    model = reference_model("llama31")
    config = GenerationConfig(do_sample=True, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P)
    processors = model._get_logits_processor(config, device="cpu")
    logits = some_logits()
    assert [type(each).__name__[:-12] for each in processors] == ["Temperature", "TopK", "TopP"]
    assert (processors(None, logits).softmax(-1) - distribution(logits, TEMPERATURE, TOP_K, TOP_P)).abs().max() < WARPED


def test_tokens_that_tie_with_the_last_of_the_likeliest_are_kept() -> None:
    logits = torch.tensor([[3.0, 1, 2, 2, 0, 2]], dtype=torch.float64)
    assert torch.equal(distribution(logits, 1.0, 2, 1.0), warped(logits, 1.0, 2, 1.0))
    assert (distribution(logits, 1.0, 2, 1.0) > 0).tolist() == [[True, False, True, True, False, True]]


def draws(count: int, how: tuple[float, int, float], seed: int = 7, step: int = 4) -> list[int]:
    """The tokens of `count` rows that all have the same logits."""
    temperature, top_k, top_p = how
    choose = make_sampler(seed, range(100, 100 + count), temperature=temperature, top_k=top_k, top_p=top_p)
    return choose(some_logits(1).expand(count, -1), range(count), step).tolist()


def frequency_error() -> float:
    """The largest difference of a token's frequency from its probability."""
    drawn = torch.tensor(draws(DRAWN, (2.0, 30, 0.95)))
    frequencies = torch.bincount(drawn, minlength=VOCABULARY) / DRAWN
    return float((frequencies - distribution(some_logits(1), 2.0, 30, 0.95)[0]).abs().max())


def test_tokens_are_drawn_as_often_as_they_should_be() -> None:
    assert frequency_error() < DEVIATION
    drawn = set(draws(DRAWN, (TEMPERATURE, TOP_K, TOP_P)))
    assert drawn == set(distribution(some_logits(1), TEMPERATURE, TOP_K, TOP_P)[0].nonzero()[:, 0].tolist())


def all_draws_differ() -> bool:
    """200 draws each, of which no two rows of tokens agree: by seed, by step, and by row."""
    how = (2.0, VOCABULARY, 1.0)
    runs = [draws(200, how), draws(200, how, seed=8), draws(200, how, step=5), draws(201, how)[1:]]
    return len({tuple(run) for run in runs}) == 4 and all(len(set(run)) > 10 for run in runs)


def test_draws_depend_on_seed_step_and_row_and_on_nothing_else() -> None:
    assert all_draws_differ()
    torch.manual_seed(5)
    first = draws(200, PUBLISHED)
    torch.manual_seed(6)
    assert draws(200, PUBLISHED) == first
    assert draws(300, PUBLISHED)[:200] == first


def drawn_completions(model: tuple[Config, Params], **options: Any) -> list[Completion]:
    config, params = model
    prompts = prompts_for(config)
    choose = make_sampler(3, [10 * n for n in range(len(prompts))], temperature=1.0, top_k=40, top_p=0.9)
    return completions(config, params, tokenizer(range(70, 80)), prompts, choose=choose, **options)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_row_draws_the_same_tokens_in_any_batch(some_model: tuple[Config, Params], batch_size: int) -> None:
    config, params = some_model
    found = drawn_completions(some_model, batch_size=batch_size)
    assert len({len(completion.tokens) for completion in found}) > 3  # rows left the batch at different times
    for number, (prompt, completion) in enumerate(zip(prompts_for(config), found, strict=True)):
        assert completion == until(uncached_draws(config, params, prompt, 10 * number), range(70, 80))


def uncached_draws(config: Config, params: Params, prompt: Sequence[int], number: int) -> list[int]:
    """Drawing as it is defined: the whole sequence through the model, and a row of one."""
    tokens, choose = list(prompt), make_sampler(3, [number], temperature=1.0, top_k=40, top_p=0.9)
    for step in range(NEW):
        logits, _ = forward(config, params, torch.tensor([tokens]))
        tokens.append(int(choose(logits[:, -1], [0], step)))
    return tokens[len(prompt) :]


def test_one_token_to_draw_from_is_greedy(model: tuple[Config, Params]) -> None:
    config, params = model
    prompts = prompts_for(config)
    choose = make_sampler(0, range(len(prompts)), temperature=1.0, top_k=1, top_p=1.0)
    assert completions(config, params, tokenizer(), prompts, choose=choose) == completions(
        config, params, tokenizer(), prompts
    )
