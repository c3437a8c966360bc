"""Decoding, many prompts at a time: the likeliest token each time, or one drawn from the model's distribution.

Each prompt goes once through the decoder to fill the cache, a few prompts of similar length at a time; then all go on
together, token by token. Rows of a batch may differ in length and end at different times: finished rows leave the
batch as soon as half of it is finished. A row's result, be it drawn or not, depends on what it is batched with only by
the rounding of the products. Read next: `evaluation/estimates.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lfu.data.batches import pad
from lfu.data.tokens import ModelTokenizer
from lfu.errors import InputError
from lfu.lora import Adapter
from lfu.model import (
    Attend,
    Config,
    Params,
    attention_mask,
    base_product,
    block,
    embed,
    linear_with_adapters,
    rotary_tables,
    stream_dtype,
    unembed,
)

PREFILL = 8
"""How many prompts fill the cache together."""


class Cache(NamedTuple):
    """The keys and values of the tokens decoded so far: `lengths[b]` in row b; what lies after is never seen."""

    keys: list[Tensor]  # K of [B, G, capacity, h]
    values: list[Tensor]  # K of [B, G, capacity, h]
    lengths: Tensor  # [B]


class Completion(NamedTuple):
    text: str  # up to the EOS token or the first stop string
    tokens: list[int]  # everything generated before EOS
    finished: bool  # False: the budget of new tokens ran out


Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""(logits [B,V], the indices of the B prompts, how many tokens each has got so far) -> the next tokens [B]."""


def greedy(logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:  # [B,V] -> [B]
    """The likeliest tokens."""
    return logits.argmax(-1)


def generate(
    config: Config,
    params: Params,
    tokenizer: ModelTokenizer,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[Adapter] = (),
    *,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    choose: Choose = greedy,
) -> Iterator[tuple[int, Completion]]:
    """Yields (index of the prompt, its completion), batch by batch, prompts of similar length together.

    A completion ends at any EOS id of `tokenizer`, or where its text first contains a string of `stop`, which is cut
    off. `choose` is `greedy` or made by `make_sampler`. InputError for an empty prompt: there is nothing to continue.
    """
    if not all(prompts):
        raise InputError(
            "A prompt without tokens cannot be continued: ask something, or use a template or the BOS token."
        )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = {index: prompts[index] for index in order[start : start + batch_size]}
        with torch.inference_mode():
            tokens = decode_batch(config, params, tokenizer, batch, adapters, max_new_tokens, stop, choose)
        yield from ((index, complete(tokenizer, ids, stop)) for index, ids in tokens.items())


def decode_batch(
    config: Config,
    params: Params,
    tokenizer: ModelTokenizer,
    prompts: Mapping[int, Sequence[int]],
    adapters: Sequence[Adapter],
    max_new_tokens: int,
    stop: Sequence[str],
    choose: Choose,
) -> dict[int, list[int]]:
    """The new tokens of each prompt, the EOS included where there is one."""
    cache = empty_cache(config, params, len(prompts), max(map(len, prompts.values())) + max_new_tokens)
    logits, cache = prefill(config, params, list(prompts.values()), cache, adapters)
    rows = list(prompts)
    outputs: dict[int, list[int]] = {row: [] for row in prompts}
    done = dict.fromkeys(prompts, False)
    for step, left in enumerate(reversed(range(max_new_tokens))):
        if strange := [row for row, finite in zip(rows, logits.sum(-1).isfinite().tolist()) if not finite]:
            raise InputError(f"The model's logits for prompt {strange[0] + 1} are not finite: see its --dtype.")
        chosen = choose(logits, rows, step)  # [rows]
        for row, token in zip(rows, chosen.tolist()):
            if not done[row]:
                outputs[row].append(token)
                done[row] = is_finished(tokenizer, outputs[row], stop)
        going = [place for place, row in enumerate(rows) if not done[row]]
        if not (going and left):
            break
        if 2 * len(going) <= len(rows):
            rows, kept = [rows[place] for place in going], torch.tensor(going, device=chosen.device)
            chosen, cache = chosen[kept], select(cache, kept)
        logits, cache = decode(config, params, chosen[:, None], torch.ones_like(chosen), cache, adapters)
    return outputs


def prefill(
    config: Config, params: Params, prompts: Sequence[Sequence[int]], cache: Cache, adapters: Sequence[Adapter]
) -> tuple[Tensor, Cache]:  # -> [B,V]
    """Logits after each prompt, and the cache that holds them all.

    PREFILL prompts at a time, written through views of the cache: as prompts come sorted by length, a few of them need
    little padding, and what is computed in between stays small.
    """
    counts = torch.tensor([len(prompt) for prompt in prompts], device=params.embed.device)
    logits = []
    for start in range(0, len(prompts), PREFILL):
        group = slice(start, start + PREFILL)
        tokens = pad(prompts[group]).to(counts.device)
        logits.append(decode(config, params, tokens, counts[group], select(cache, group), adapters)[0])
    return torch.cat(logits), cache._replace(lengths=counts)


def is_finished(tokenizer: ModelTokenizer, tokens: list[int], stop: Sequence[str]) -> bool:
    """Whether a row has reached an EOS id or a stop string."""
    if tokens and tokens[-1] in tokenizer.stops:
        return True
    text = tokenizer.backend.decode(tokens) if stop else ""
    return any(string in text for string in stop)


def select(cache: Cache, rows: Tensor | slice) -> Cache:
    """The cache of some of its rows: a copy of them, or a view where they are a slice."""
    keys, values = ([slots[rows] for slots in held] for held in (cache.keys, cache.values))
    return Cache(keys, values, cache.lengths[rows])


def complete(tokenizer: ModelTokenizer, tokens: list[int], stop: Sequence[str]) -> Completion:
    """Tokens -> text without EOS, cut at the first stop string."""
    finished = is_finished(tokenizer, tokens, stop)
    tokens = tokens[:-1] if tokens and tokens[-1] in tokenizer.stops else tokens
    text = tokenizer.backend.decode(tokens)
    cut = min((text.index(string) for string in stop if string in text), default=len(text))
    return Completion(text[:cut], tokens, finished)


# --- one step with a cache ------------------------------------------------------------------------


def empty_cache(config: Config, params: Params, batch: int, capacity: int) -> Cache:
    """Room for `capacity` tokens in each of `batch` rows."""
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    dtype, device = stream_dtype(params), params.embed.device
    keys, values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in params.layers] for _ in range(2))
    return Cache(keys, values, torch.zeros(batch, dtype=torch.int64, device=device))


def decode(
    config: Config, params: Params, tokens: Tensor, counts: Tensor, cache: Cache, adapters: Sequence[Adapter] = ()
) -> tuple[Tensor, Cache]:  # [B,T], [B] -> [B,V]
    """Feed the first counts[b] tokens of each right-padded row; logits after the last of them, and the longer cache.

    A row's tokens stand at positions lengths[b] onward, in the cache slots of the same numbers, so rows of unequal
    length need no left padding: filler lands in slots that no query sees before real tokens overwrite them. The slots
    are written in place, and the cache passed in stays valid for its own lengths. InputError if it lacks room, filler
    included.
    """
    positions = cache.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # [B,T]
    end = int(positions.max()) + 1
    if end > cache.keys[0].shape[2]:
        raise InputError(f"The cache has room for {cache.keys[0].shape[2]} tokens a row; {end} are needed.")
    mask = attention_mask(positions, torch.arange(end, device=tokens.device), config.sliding_window)  # [B,T,end]
    # The query heads of a group stand one after the other as further queries: expanding the keys would copy the whole
    # cache for every token.
    mask = mask[:, None].repeat(1, 1, config.num_attention_heads // config.num_key_value_heads, 1)  # [B,1,(H/G)*T,end]
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    x = embed(params, tokens)
    cos, sin = rotary_tables(config, positions, x.dtype)
    rotary = cos[:, None], sin[:, None]  # [B,1,T,h]
    for index, layer in enumerate(params.layers):
        linear = linear_with_adapters(layer, index, adapters, base_product)
        attend = attend_with_cache(cache.keys[index], cache.values[index], rows, positions, mask)
        x = block(config, layer, x, rotary, linear, attend)
    last = x[rows[:, 0], counts - 1]  # [B,D]
    return unembed(config, params, last), cache._replace(lengths=cache.lengths + counts)


def attend_with_cache(keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, mask: Tensor) -> Attend:
    """Attention that first writes the new keys and values into a block's cache, at `positions` of `rows`."""
    end = mask.shape[-1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys[rows, :, positions] = k.transpose(1, 2)
        values[rows, :, positions] = v.transpose(1, 2)
        queries = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B,G,(H/G)*T,h]
        heads = F.scaled_dot_product_attention(queries, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        return heads.unflatten(2, (-1, q.shape[2])).flatten(1, 2)

    return attend


# --- drawing --------------------------------------------------------------------------------------


def make_sampler(seed: int, numbers: Sequence[int], *, temperature: float, top_k: int, top_p: float) -> Choose:
    """A `choose` that draws from `distribution`; `numbers` gives each prompt a number of its own, such as its row's.

    What is drawn is a function of (seed, number, step) and the logits alone: no state, no batch. So the draws of a run
    that is cut off and continued are those of one that was not.
    """

    def choose(logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
        # In (0, 1], so that the first sum that reaches it exists and belongs to a token of positive probability.
        shares = [1 - np.random.default_rng([seed, numbers[index], step]).random() for index in prompts]
        sums = distribution(logits, temperature, top_k, top_p).double().cumsum(-1)
        reached = sums[:, -1:] * torch.tensor(shares, dtype=sums.dtype, device=sums.device)[:, None]
        return torch.searchsorted(sums, reached)[:, 0]

    return choose


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:  # [B,V] -> [B,V]
    """What is drawn from: temperature, then the top_k likeliest tokens, then the fewest of these that hold top_p.

    The order and the ties (with the last of the top_k likeliest, all are kept) of transformers'
    `generation/logits_process.py`. temperature > 0, top_k ≥ 1, 0 < top_p ≤ 1; top_k = V and top_p = 1 leave all tokens.
    """
    logits = logits / temperature
    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
    probabilities, tokens = logits.masked_fill(logits < least, -torch.inf).softmax(-1).sort(descending=True)
    likelier = probabilities.cumsum(-1) - probabilities  # what the likelier tokens hold
    kept = probabilities.masked_fill(likelier >= top_p, 0)
    return torch.zeros_like(kept).scatter(-1, tokens, kept / kept.sum(-1, keepdim=True))
