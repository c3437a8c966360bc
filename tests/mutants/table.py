"""Mistakes that a careful engineer could make, each with the check of the suite that catches it.

In the order of lfu's own chapters. `make mutants` prints the table with the errors measured. Where a mistake concerns
every kind of model, so does its check, and the smallest error counts.
"""

from mutants import checks
from mutants.mutation import Check, Mutant

Edit = tuple[str, str, str, Check]
"""The mistake, the passage, what has become of it, and the check that catches it."""


def mistakes_in(function: str, *edits: Edit) -> list[Mutant]:
    return [Mutant(function, *edit) for edit in edits]


MODEL = [
    *mistakes_in(
        "model.inverse_frequencies",
        ("no rope scaling", "if config.rope_scaling is None:", "if True:", checks.decoder("llama31")),
        (
            "slow and fast frequencies exchanged",
            "(1 - blend) * frequencies / factor + blend * frequencies",
            "blend * frequencies / factor + (1 - blend) * frequencies",
            checks.decoder("llama31"),
        ),
        ("scaling of another context", "turns = original", "turns = original / 2", checks.decoder("llama31")),
        ("turns without 2π", " / (2 * math.pi)", "", checks.FREQUENCIES),
        (
            "no blend between slow and fast",
            "((turns - low) / (high - low)).clamp(0, 1)",
            "(turns > low).float()",
            checks.FREQUENCIES,
        ),
        ("theta of another model", "config.rope_theta**", "2e4**", checks.ANY),
        ("exponent of half the head", "/ config.head_dim", "/ (config.head_dim // 2)", checks.ANY),
    ),
    *mistakes_in(
        "model.rotary_tables",
        (
            "angles in bfloat16",
            "positions[..., None].float() * inverse_frequencies(config)",
            "positions[..., None].bfloat16() * inverse_frequencies(config).bfloat16()",
            checks.ANY,
        ),
        (
            "each angle twice in a row, as for interleaved pairs",
            "torch.cat([angles, angles], dim=-1)",
            "angles.repeat_interleave(2, dim=-1)",
            checks.ANY,
        ),
    ),
    *mistakes_in(
        "model.rotate",
        (
            "pairs interleaved",
            "torch.cat([-second, first], dim=-1)",
            "torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)",
            checks.ANY,
        ),
        ("turned backwards", "[-second, first]", "[second, -first]", checks.ANY),
        ("no rotation", "x * cos + torch.cat([-second, first], dim=-1) * sin", "x", checks.ANY),
    ),
    *mistakes_in(
        "model.rms_norm",
        ("epsilon of another model", "keepdim=True) + eps", "keepdim=True) + 1e-6", checks.ANY),
        (
            "epsilon outside the root",
            "torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)",
            "1 / (x.square().mean(-1, keepdim=True).sqrt() + eps)",
            checks.WHOLE,
        ),
        ("weight forgotten", " * weight.to(x.dtype)", "", checks.ANY),
        ("weight counted from 1, as in Gemma", "weight.to(x.dtype)", "(1 + weight.to(x.dtype))", checks.ANY),
        ("mean removed", "x.square().mean(-1, keepdim=True)", "x.var(-1, keepdim=True)", checks.ANY),
    ),
    *mistakes_in(
        "model.split_heads",
        (
            "features of the heads interleaved",
            "x.unflatten(-1, (-1, head_dim)).transpose(1, 2)",
            "x.unflatten(-1, (head_dim, -1)).permute(0, 3, 1, 2)",
            checks.ANY,
        ),
    ),
    *mistakes_in(
        "model.causal_attention",
        (
            "key/value heads tiled",
            "heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1)",
            "heads.repeat(1, q.shape[1] // heads.shape[1], 1, 1)",
            checks.decoder(*checks.GROUPED),
        ),
        ("not causal", "is_causal=mask is None", "is_causal=False", checks.decoder("llama2", "llama31", "qwen3")),
        ("no window", "attn_mask=mask, is_causal=mask is None", "is_causal=True", checks.decoder("mistral_v01")),
        ("scores not divided by √h", "is_causal=mask is None", "is_causal=mask is None, scale=1.0", checks.ANY),
    ),
    *mistakes_in(
        "model.attention_mask",
        ("window one longer", "keys > queries", "keys >= queries", checks.decoder("mistral_v01")),
        ("window one shorter", "queries - window)", "queries - window + 1)", checks.decoder("mistral_v01")),
    ),
    *mistakes_in(
        "model.block",
        (
            "head norms skipped",
            "if layer.q_norm is not None and layer.k_norm is not None:",
            "if False:",
            checks.decoder(*checks.QWEN3),
        ),
        (
            "head norms exchanged",
            "rms_norm(q, layer.q_norm, config.rms_norm_eps), rms_norm(k, layer.k_norm, config.rms_norm_eps)",
            "rms_norm(q, layer.k_norm, config.rms_norm_eps), rms_norm(k, layer.q_norm, config.rms_norm_eps)",
            checks.decoder(*checks.QWEN3),
        ),
        (
            "head norms after rotation",
            "q, k = rms_norm(q, layer.q_norm, config.rms_norm_eps), rms_norm(k, layer.k_norm, config.rms_norm_eps)\n"
            "    heads = attend(rotate(q, rotary), rotate(k, rotary), v)",
            "eps, q, k = config.rms_norm_eps, rotate(q, rotary), rotate(k, rotary)\n"
            "        q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)\n"
            "    heads = attend(q, k, v)",
            checks.decoder(*checks.QWEN3),
        ),
        ("values rotated too", "rotate(k, rotary), v)", "rotate(k, rotary), rotate(v, rotary))", checks.ANY),
        (
            "first norm's weight forgotten",
            "layer.input_layernorm",
            "torch.ones_like(layer.input_layernorm)",
            checks.ANY,
        ),
        (
            "second norm's weight forgotten",
            "layer.post_attention_layernorm",
            "torch.ones_like(layer.post_attention_layernorm)",
            checks.ANY,
        ),
        (
            "weight of the keys' norm forgotten",
            "rms_norm(k, layer.k_norm,",
            "rms_norm(k, torch.ones_like(layer.k_norm),",
            checks.decoder(*checks.QWEN3),
        ),
        ("first norm takes the second's weight", "layer.input_layernorm", "layer.post_attention_layernorm", checks.ANY),
        ("second norm takes the first's weight", "layer.post_attention_layernorm", "layer.input_layernorm", checks.ANY),
        (
            "gate and up exchanged",
            'F.silu(linear("gate_proj", z)) * linear("up_proj", z)',
            'F.silu(linear("up_proj", z)) * linear("gate_proj", z)',
            checks.ANY,
        ),
        ("GELU in place of SiLU", "F.silu(", "F.gelu(", checks.ANY),
        ("stream not carried past attention", 'x = x + linear("o_proj"', 'x = linear("o_proj"', checks.ANY),
        ("stream not carried past the MLP", 'return x + linear("down_proj"', 'return linear("down_proj"', checks.ANY),
    ),
    *mistakes_in(
        "model.unembed",
        (
            "final norm forgotten",
            "rms_norm(h, params.norm, config.rms_norm_eps), params.lm_head",
            "h, params.lm_head",
            checks.ANY,
        ),
        ("final norm's weight forgotten", "params.norm,", "torch.ones_like(params.norm),", checks.ANY),
        ("output layer always tied", "params.lm_head", "params.embed", checks.decoder(*checks.UNTIED)),
    ),
    *mistakes_in(
        "model.trunk",
        (
            "h_l taken before the block",
            "        x = block(config, layer, x.view_as(x),",
            "        hidden.append(x)\n        x = block(config, layer, x.view_as(x),",
            checks.part("consistency", *checks.BOTH),
        ),
        (
            "h_l taken before its steering vector",
            "        if steering is not None:\n"
            "            x = x + steering.mask[..., None] * steering.vectors[index]\n"
            "        hidden.append(x)\n",
            "        hidden.append(x)\n"
            "        if steering is not None:\n"
            "            x = x + steering.mask[..., None] * steering.vectors[index]\n",
            checks.part("consistency", "steering"),
        ),
        (
            "steering before the block",
            "        x = block(config, layer, x.view_as(x), rotary, "
            "linear_with_adapters(layer, index, adapters, product), attend)\n"
            "        if steering is not None:\n"
            "            x = x + steering.mask[..., None] * steering.vectors[index]\n",
            "        if steering is not None:\n"
            "            x = x + steering.mask[..., None] * steering.vectors[index]\n"
            "        x = block(config, layer, x.view_as(x), rotary, "
            "linear_with_adapters(layer, index, adapters, product), attend)\n",
            checks.part("ascent", "steering"),
        ),
        ("mask of steering forgotten", "steering.mask[..., None] * ", "", checks.part("whole", "steering")),
        ("steering one position late", "steering.mask[", "steering.mask.roll(1, 1)[", checks.part("whole", "steering")),
        ("vector of another block", "steering.vectors[index]", "steering.vectors[index - 1]", checks.STEERED),
    ),
    *mistakes_in(
        "model.linear_with_adapters",
        ("scale forgotten", "scale * B)", "B)", checks.reading("other alpha")),
        (
            "last adapter only",
            "y = y + F.linear(",
            "y = product(index, name, x, getattr(layer, name)) + F.linear(",
            checks.STACK,
        ),
        ("adapter of the next block", "lora[index][name]", "lora[index - 1][name]", checks.reading("published")),
        ("bias forgotten", "y = y + bias.to(y.dtype)", "pass", checks.decoder("qwen2")),
        (
            "bias on o_proj",
            'f"{name}_bias"',
            'f"{name}_bias".replace("o_proj", "q_proj")',
            checks.decoder("qwen2"),
        ),
        (
            "bias added twice in the perturbed pass",
            "bias.to(y.dtype)",
            'bias.to(y.dtype) * (1 + ("relative_to" in product.__qualname__))',
            checks.part("consistency", *checks.BOTH, kind="qwen2"),
        ),
    ),
    *mistakes_in(
        "model.relative_to",
        ("recorded product forgotten", "y0.to(x.dtype) + ", "", checks.RELATIVE),
        ("recorded input forgotten", "linear(x - x0, W)", "linear(x, W)", checks.RELATIVE),
        ("record of the first block", "record.pop((layer, name))", "record[0, name]", checks.RELATIVE),
        (
            "both passes rounded",
            "y0.to(x.dtype) + linear(x - x0, W)",
            "linear(x, W)",
            checks.bfloat16(*checks.BOTH),
        ),
    ),
    *mistakes_in(
        "generate.decode",
        (
            "new tokens turned as if they were the first",
            "rotary_tables(config, positions, x.dtype)",
            "rotary_tables(config, positions - cache.lengths[:, None], x.dtype)",
            checks.decoding("llama31"),
        ),
        (
            "new tokens turned one position too far",
            "rotary_tables(config, positions, x.dtype)",
            "rotary_tables(config, positions + (cache.lengths[:, None] > 0), x.dtype)",
            checks.decoding("llama31"),
        ),
        ("no window", "config.sliding_window)", "None)", checks.decoding("mistral_v01")),
        ("logits after the filler", "x[rows[:, 0], counts - 1]", "x[:, -1]", checks.decoding("qwen3")),
        ("filler counted", "cache.lengths + counts", "cache.lengths + tokens.shape[1]", checks.decoding("qwen3")),
    ),
    *mistakes_in(
        "generate.attend_with_cache",
        (
            "keys cached as values",
            "values[rows, :, positions] = v.transpose(1, 2)",
            "values[rows, :, positions] = k.transpose(1, 2)",
            checks.decoding("llama31"),
        ),
        (
            "query heads read another group's keys",
            "q.unflatten(1, (k.shape[1], -1))",
            "q.unflatten(1, (-1, k.shape[1])).transpose(1, 2)",
            checks.decoding("llama31"),
        ),
    ),
]

LORA = [
    *mistakes_in(
        "lora.init",
        (
            "A wider by √3, Kaiming without its gain",
            "-1 / math.sqrt(in_), 1 / math.sqrt(in_)",
            "-math.sqrt(3 / in_), math.sqrt(3 / in_)",
            checks.DRAWN,
        ),
        (
            "A normal",
            "uniform_(-1 / math.sqrt(in_), 1 / math.sqrt(in_), generator=generator)",
            "normal_(0, 1 / math.sqrt(in_), generator=generator)",
            checks.DRAWN,
        ),
        ("B not zero", "torch.zeros(out, rank,", "torch.ones(out, rank,", checks.FRESH),
    ),
    *mistakes_in(
        "lora.stack",
        ("all at the scale of the first", "fold_scale(lora, scale)", "fold_scale(lora, adapters[0][1])", checks.STACK),
        ("scale twice", "if alike else 1.0", "", checks.STACK),
        ("shared scale lost", "adapters[0][1] if alike else 1.0", "1.0", checks.part("whole", "lora")),
    ),
    *mistakes_in(
        "lora.concatenate_ranks",
        (
            "A of the second forgotten",
            "torch.cat([A for A, _ in both])",
            "torch.cat([both[0].A[torch.arange(len(A)) % len(both[0].A)] for A, _ in both])",
            checks.STACK,
        ),
    ),
    *mistakes_in(
        "lora.merge",
        ("scale forgotten", "scale * (", "(", checks.MERGED),
        (
            "rounded twice",
            "(W.to(stream) + scale * (pair.B.to(stream) @ pair.A.to(stream))).to(W.dtype)",
            "W + (scale * (pair.B.to(stream) @ pair.A.to(stream))).to(W.dtype)",
            checks.MISROUNDED,
        ),
        (
            "multiplied in the dtype of W",
            "pair.B.to(stream) @ pair.A.to(stream)",
            "pair.B.to(W.dtype) @ pair.A.to(W.dtype)",
            checks.MISROUNDED,
        ),
    ),
    *mistakes_in(
        "lora.load",
        (
            "scale α in place of α / r",
            '(math.sqrt(rank) if flag(path, options, "use_rslora") else rank)',
            "1",
            checks.reading("other alpha"),
        ),
        (
            "scale α / r where α / √r is meant",
            'math.sqrt(rank) if flag(path, options, "use_rslora") else rank',
            "rank",
            checks.reading("rslora"),
        ),
    ),
]

LOSS = [
    *mistakes_in(
        "loss.answer_mask",
        (
            "mask unshifted",
            "F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)",
            "labels != IGNORED",
            checks.PREDICTS,
        ),
        (
            "the last position predicts the first label",
            "F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)",
            "labels.roll(-1, 1) != IGNORED",
            checks.LAST,
        ),
    ),
    *mistakes_in(
        "loss.sft_loss",
        ("labels unshifted", "answer_mask(labels)]", "answer_mask(labels).roll(1, 1)]", checks.SFT_LOSS),
        (
            "mean of the rows' means",
            "return answer_loss(logits[answer_mask(labels)], answer_labels(labels))",
            "rows = [answer_loss(logits[i][answer_mask(labels)[i]], answer_labels(labels[i : i + 1])) "
            "for i in range(2)]\n"
            "    return torch.stack(rows).mean()",
            checks.SFT_LOSS,
        ),
        (
            "mean over prompts and padding too",
            "answer_labels(labels))",
            "answer_labels(labels)) * (len(answer_labels(labels)) / labels.numel())",
            checks.SFT_LOSS,
        ),
    ),
    *mistakes_in(
        "loss.answer_loss",
        ("sum in place of mean", "answers)\n", 'answers, reduction="sum")\n', checks.SFT_LOSS),
        ("bits in place of nats", "logits, answers)\n", "logits, answers) / 0.6931471805599453\n", checks.SFT_LOSS),
    ),
    *mistakes_in(
        "loss.consistency_loss",
        ("h carries a gradient", "h.detach() - ", "h - ", checks.LEAKS),
        (
            "the perturbed side detached",
            "h.detach() - h_perturbed",
            "h - h_perturbed.detach()",
            checks.part("consistency", *checks.BOTH),
        ),
        (
            "one position late",
            "where(mask, reduce",
            "where(mask.roll(1, 1), reduce",
            checks.part("consistency", *checks.BOTH),
        ),
        (
            "prompts and padding too",
            "torch.where(mask, reduce(squares, dim=-1), 0.0).sum() / mask.sum()",
            "reduce(squares, dim=-1).mean()",
            checks.part("consistency", *checks.BOTH),
        ),
        ("not squared", "h_perturbed).square()", "h_perturbed).abs()", checks.consistency_loss(None, "mean")),
        ("sum over blocks", "]).mean()", "]).sum()", checks.BLOCKS),
        (
            "blocks off by one",
            "hidden[i - 1], perturbed[i - 1]",
            "hidden[i - 2], perturbed[i - 2]",
            checks.consistency_loss(frozenset({2, 3}), "mean"),
        ),
        (
            "the printed sum computed as a mean",
            'torch.sum if norm == "sum" else torch.mean',
            "torch.mean",
            checks.consistency_loss(None, "sum"),
        ),
        ("sum over positions", " / mask.sum()", "", checks.consistency_loss(None, "mean")),
        (
            "relative to the perturbed states",
            "average(h.detach().square())",
            "average(h_perturbed.detach().square())",
            checks.consistency_loss(None, "relative"),
        ),
    ),
    *mistakes_in(
        "loss.resolve_layers",
        ("blocks chosen by hand ignored", "sorted(set(layers))", "list(range(1, count + 1))", checks.CHOSEN),
    ),
]

STEP = [
    *mistakes_in(
        "train.sft_gradient",
        ("scale forgotten", "(task, scale)", "(task, 1.0)", checks.part("sft", "lora")),
        (
            "logits one position late",
            "answer_mask(batch.labels)",
            "answer_mask(batch.labels).roll(1, 1)",
            checks.part("sft", "lora"),
        ),
    ),
    *mistakes_in(
        "train.lfu_gradient",
        ("logits one position late", "positions = mask", "positions = mask.roll(1, 1)", checks.WHOLE),
        ("logits of the block before", "hidden[-1][positions]", "hidden[-2][positions]", checks.WHOLE),
        (
            "gradient through h",
            "compare(hidden, perturbed, mask, layers=layers, norm=norm), ()",
            "torch.stack([(h - p)[mask].square().mean() for h, p in zip("
            "trunk(config, base, x, [(task, scale)]), perturbed)]).mean(), ()",
            checks.part("consistency", *checks.BOTH),
        ),
        (
            "gradient through the ascent",
            "        perturbed = run_trunk(config, base, x, "
            "*with_aux(task, undesirable, scale, mask), exact_product)\n",
            "        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):\n"
            "            moving = ascend(aux, torch.func.grad(lambda aux: objective(task, aux)[0])(aux), alpha)\n"
            "            perturbed = run_trunk(config, base, x, *with_aux(task, moving, scale, mask), exact_product)\n",
            checks.SLOPE,
        ),
        (
            "auxiliary component left where it started",
            "run_trunk(config, base, x, *with_aux(task, undesirable, scale, mask)",
            "run_trunk(config, base, x, *with_aux(task, aux, scale, mask)",
            checks.part("consistency", *checks.BOTH),
        ),
        (
            "θ held still in the perturbed pass",
            "*with_aux(task, undesirable, scale, mask)",
            "*with_aux(tree_map(torch.Tensor.detach, task), undesirable, scale, mask)",
            checks.part("consistency", *checks.BOTH),
        ),
        ("λ squared", "g + lam * c", "g + lam * lam * c", checks.WHOLE),
        ("λ on the SFT gradient too", "g + lam * c", "lam * (g + c)", checks.WHOLE),
        ("λ and 1 - λ", "g + lam * c", "(1 - lam) * g + lam * c", checks.WHOLE),
        ("consistency driven up", "g + lam * c", "g - lam * c", checks.WHOLE),
        ("choice of blocks not handed on", "layers=layers", "layers=None", checks.CHOSEN),
        ("norm after the step reported", "global_norm(g_aux)}", "global_norm(undesirable)}", checks.METRICS),
        ("consistency reported with its weight", '"consistency": cons', '"consistency": lam * cons', checks.METRICS),
    ),
    *mistakes_in(
        "train.with_aux",
        (
            "steering at every position",
            "Steering(aux, mask)",
            "Steering(aux, torch.ones_like(mask))",
            checks.part("whole", "steering"),
        ),
        ("auxiliary LoRA without its scale", "(aux, scale)", "(aux, 1.0)", checks.part("whole", "lora")),
    ),
    *mistakes_in(
        "train.ascend",
        ("descent", "a + step", "a - step", checks.WHOLE),
        ("not normalised", "alpha / length, 0.0", "alpha, 0.0", checks.part("consistency", *checks.BOTH)),
        (
            "one norm per tensor",
            "step * g",
            "(alpha / torch.linalg.vector_norm(g, dim=-1, keepdim=True).clamp(min=1e-30)) * g",
            checks.part("consistency", *checks.BOTH),
        ),
        ("sign of the gradient", "step * g", "alpha * g.sign()", checks.part("consistency", *checks.BOTH)),
        ("squared norm", "alpha / length, 0.0", "alpha / length**2, 0.0", checks.part("consistency", *checks.BOTH)),
    ),
    *mistakes_in(
        "train.global_norm",
        (
            "sum of the tensors' norms",
            "torch.linalg.vector_norm(torch.stack(",
            "torch.sum(torch.stack(",
            checks.part("consistency", "lora"),
        ),
    ),
    *mistakes_in(
        "train.init_like",
        (
            "the same auxiliary LoRA for every batch",
            "generator=generator",
            "generator=torch.Generator().manual_seed(0)",
            checks.weighted_sum("lfu-lora"),
        ),
    ),
]

MEMORY = [
    *mistakes_in(
        "remat.single_block",
        ("adapter of the first block", "lora[index : index + 1]", "lora[:1]", checks.remat("none", *checks.BOTH)),
        (
            "vector of the first block",
            "steering.vectors[index : index + 1]",
            "steering.vectors[:1]",
            checks.remat("steering"),
        ),
    ),
    *mistakes_in(
        "remat.relative_to_states",
        (
            "products after the block in place of before it",
            "before[layer]",
            "before[layer + 1]",
            checks.remat(*checks.BOTH),
        ),
    ),
    *mistakes_in(
        "profiling.memory.expected_peak",
        (
            "a line through the two peaks",
            "max(low + (high - low) * further for low, high in zip(short, long))",
            "max(short) + (max(long) - max(short)) * further",
            checks.EXPECTED_PEAK,
        ),
    ),
    *mistakes_in(
        "remat.Rematerialised.backward",
        (
            "backward through zeros",
            "*ctx.saved_tensors)",
            "*map(torch.zeros_like, ctx.saved_tensors))",
            checks.remat("none", *checks.BOTH),
        ),
    ),
]

BENCH = [
    *mistakes_in(
        "profiling.bench.flop_parts",
        ("attention forgotten", "7 * len(passes)", "0 * len(passes)", checks.FLOPS),
        ("a gradient of the frozen weights", "2 * len(passes)", "3 * len(passes)", checks.FLOPS),
        ("adapters' own gradient forgotten", "3 * ranks", "2 * ranks", checks.FLOPS),
        ("output layer without its backward pass", '"answer": 2 * answers', '"answer": answers', checks.HEAD_FLOPS),
    ),
]

LOOP = [
    *mistakes_in(
        "train.step_gradient",
        (
            "weighted by rows",
            "sum(example.num_loss_tokens for example in micro_batch) / total",
            "len(micro_batch) / len(examples)",
            checks.ACCUMULATION,
        ),
        (
            "weighted by all tokens, prompts included",
            "sum(example.num_loss_tokens for example in micro_batch) / total",
            "sum(len(e.tokens) for e in micro_batch) / sum(len(e.tokens) for e in examples)",
            checks.ACCUMULATION,
        ),
        (
            "mean of the micro-batches' means",
            "sum(example.num_loss_tokens for example in micro_batch) / total",
            "1 / math.ceil(len(examples) / settings.micro_batch_size)",
            checks.ACCUMULATION,
        ),
        (
            "last micro-batch in place of their sum",
            "tree_map(partial(torch.add, alpha=weight), gradient, part)",
            "part",
            checks.ACCUMULATION,
        ),
        (
            "loss of the last micro-batch reported",
            "metrics.get(name, 0.0) + weight * float(value)",
            "float(value)",
            checks.ACCUMULATION,
        ),
        (
            "one auxiliary LoRA for all micro-batches",
            "generator_for(settings, step, index, device)",
            "generator_for(settings, step, 0, device)",
            checks.weighted_sum("lfu-lora"),
        ),
    ),
    *mistakes_in(
        "schedule.generator_for",
        (
            "the same randomness in every step",
            "[settings.seed, step, index]",
            "[settings.seed, index]",
            checks.DRAWS,
        ),
        ("step and index added up", "[settings.seed, step, index]", "[settings.seed, step + index]", checks.DRAWS),
    ),
    *mistakes_in(
        "schedule.steps_per_epoch",
        (
            "last partial step dropped",
            "math.ceil(count / settings.batch_size)",
            "count // settings.batch_size",
            checks.EVERY_ROW,
        ),
    ),
    *mistakes_in(
        "schedule.rows_of_step",
        (
            "every epoch in the same order",
            "shuffled(count, settings.seed, epoch)",
            "shuffled(count, settings.seed, 0)",
            checks.ANOTHER_ORDER,
        ),
        ("first rows of the epoch in every step", "position * settings.batch_size", "0", checks.EVERY_ROW),
    ),
    *mistakes_in(
        "schedule.learning_rate",
        ("warm-up off by one: not 0 at step 0", "step / warmup", "(step + 1) / warmup", checks.schedule(1404, 0.1)),
        ("warm-up rounded down", "math.ceil(", "math.floor(", checks.schedule(1404, 0.1)),
        (
            "cosine over all steps",
            "(step - warmup) / (steps - warmup)",
            "step / steps",
            checks.schedule(1404, 0.1),
        ),
        ("cosine never reaches 0", "0.5 * (1 +", "(0.1 + 0.45) * (1 +", checks.schedule(1404, 0.1)),
        ("a whole cosine", "math.cos(math.pi *", "math.cos(2 * math.pi *", checks.schedule(1404, 0.1)),
        (
            "cosine one step early",
            "math.pi * (step - warmup)",
            "math.pi * (step + 1 - warmup)",
            checks.schedule(1404, 0.1),
        ),
    ),
    *mistakes_in(
        "train.adamw",
        ("PyTorch's default weight decay", ", weight_decay=settings.weight_decay", "", checks.adamw(0.0)),
        (
            "weight decay added to the gradient",
            "torch.optim.AdamW(",
            "torch.optim.Adam(",
            checks.adamw(0.1),
        ),
    ),
    *mistakes_in(
        "train.clip",
        (
            "each tensor for itself",
            "g * (limit / norm)",
            "g * (limit / torch.linalg.vector_norm(g))",
            checks.CLIPPING,
        ),
        ("each number for itself", "g * (limit / norm)", "g.clamp(-limit, limit)", checks.CLIPPING),
        ("a short gradient lengthened", " if norm > limit else gradient", "", checks.SHORT),
    ),
    *mistakes_in(
        "train.apply",
        ("learning rate not handed on", 'group["lr"] = rate', "pass", checks.adamw(0.0)),
        ("ascent in place of descent", "parameter.grad = value", "parameter.grad = -value", checks.ACCUMULATION),
    ),
]

DATA = [
    *mistakes_in(
        "data.batches.Example.num_loss_tokens",
        ("the first token counted", "max(self.prompt_length, 1)", "self.prompt_length", checks.SUPERVISED),
        ("the first token of an instruction counted", " - (0 in self.instruction)", "", checks.INSTRUCTION_SUPERVISED),
    ),
    *mistakes_in(
        "data.tokens.text_ids",
        ("BOS forgotten", "start + tokens", "tokens", checks.bos(True, True)),
        ("BOS where none is wanted", "tokenizer.bos if bos else ()", "tokenizer.bos", checks.bos(True, False)),
    ),
    *mistakes_in(
        "data.tokens.encode_prompt",
        (
            "pieces of a template joined before they are tokenised",
            "for piece in pieces for",
            'for piece in ["".join(pieces)] for',
            checks.PIECES,
        ),
        ("the instruction not cut out", "QUESTION.split(piece) if apart else [piece]", "[piece]", checks.INSTRUCTION),
        (
            "the space before it left to the template",
            "QUESTION.split",
            're.compile(r"(\\{question\\})").split',
            checks.SPACE,
        ),
        ("loss on all parts of the piece", 'if apart and "{question}" in part:', "if apart:", checks.INSTRUCTION),
        ("an empty instruction cut out", ' and question != ""', "", checks.EMPTY),
    ),
    *mistakes_in(
        "data.tokens.encode_text",
        (
            "BOS twice, and one in front of the answer",
            "add_special_tokens=False",
            "add_special_tokens=True",
            checks.bos(True, True),
        ),
    ),
    *mistakes_in(
        "data.tokens.encode_row",
        ("EOS missing", "[*prompt, *answer, tokenizer.eos]", "[*prompt, *answer]", checks.bos(True, True)),
        ("two EOS", "*answer, tokenizer.eos]", "*answer, tokenizer.eos, tokenizer.eos]", checks.bos(True, True)),
        (
            "prompt and answer tokenised together",
            "[*prompt, *answer, tokenizer.eos]",
            "[*prompt[:1], *token_ids(tokenizer, row.question + row.answer), tokenizer.eos]",
            checks.BORDER,
        ),
    ),
    *mistakes_in(
        "data.tokens.answer_ids",
        (
            "space before the answer forgotten",
            "require_template(format.template).before_answer + answer",
            "answer",
            checks.template("question"),
        ),
    ),
    *mistakes_in(
        "data.batches.make_labels",
        (
            "prompt carries loss",
            "[IGNORED] * example.prompt_length + example.tokens[example.prompt_length :]",
            "example.tokens",
            checks.LEARNED,
        ),
        (
            "EOS carries none",
            "example.tokens[example.prompt_length :]",
            "[*example.tokens[example.prompt_length : -1], IGNORED]",
            checks.LEARNED,
        ),
        (
            "first token of the answer carries none",
            "[IGNORED] * example.prompt_length + example.tokens[example.prompt_length :]",
            "[IGNORED] * (example.prompt_length + 1) + example.tokens[example.prompt_length + 1 :]",
            checks.LEARNED,
        ),
        (
            "labels shifted here and in the loss",
            "[IGNORED] * example.prompt_length + example.tokens[example.prompt_length :]",
            "[IGNORED] * (example.prompt_length - 1) + example.tokens[example.prompt_length :] + [IGNORED]",
            checks.COLLATED,
        ),
        ("instruction carries none", "labels[place] = example.tokens[place]", "pass", checks.INSTRUCTION),
    ),
    *mistakes_in(
        "data.chat.find_turns",
        ("the end of a turn carries none", "ends[0] + 1)", "ends[0])", checks.CHAT),
        ("the template's text after a turn carries loss", "ends[0] + 1)", "len(done))", checks.CHAT),
        (
            "the words that ask for a turn carry loss",
            "messages[:place], prompt=True)",
            "messages[:place])",
            checks.CHAT,
        ),
    ),
    *mistakes_in(
        "data.tokens.encode_chat",
        ("earlier answers carry none", "turns[:-1]", "turns[:0]", checks.CHAT),
    ),
    *mistakes_in(
        "data.batches.collate",
        ("padding carries loss", "for example in examples], IGNORED)", "for example in examples])", checks.COLLATED),
    ),
    *mistakes_in(
        "data.batches.pad",
        ("on the left", "padded[row, : len(values)]", "padded[row, -len(values) :]", checks.COLLATED),
    ),
    *mistakes_in(
        "data.batches.split_by_length",
        (
            "last partial micro-batch dropped",
            "len(ordered), size)]",
            "len(ordered) - size + 1, size)]",
            checks.MICRO_BATCHES,
        ),
        (
            "not by length",
            "sorted(examples, key=lambda example: len(example.tokens))",
            "list(examples)",
            checks.MICRO_BATCHES,
        ),
    ),
    *mistakes_in(
        "data.batches.shuffled",
        ("seed ignored", "[seed, epoch]", "[epoch]", checks.ORDERS),
        ("seed and epoch added up", "[seed, epoch]", "[seed + epoch]", checks.ORDERS),
    ),
]

GENERATION = [
    *mistakes_in(
        "generate.generate",
        (
            "completions in the order of the batches",
            "tokens.items()",
            "enumerate(tokens.values(), start)",
            checks.generation("llama31"),
        ),
    ),
    *mistakes_in(
        "generate.decode_batch",
        ("one token too many", "range(max_new_tokens)", "range(max_new_tokens + 1)", checks.generation("llama31")),
        ("one token too few", "range(max_new_tokens)", "range(max_new_tokens - 1)", checks.BUDGET),
        ("finished rows go on", "if not done[row]:", "if True:", checks.STOPPING),
    ),
    *mistakes_in(
        "generate.greedy",
        ("the rarest token", "logits.argmax(-1)", "logits.argmin(-1)", checks.generation("qwen3_untied")),
    ),
    *mistakes_in(
        "generate.distribution",
        ("temperature upside down", "logits / temperature", "logits * temperature", checks.WARPED),
        ("one token too many", "topk(min(top_k, ", "topk(min(top_k + 1, ", checks.WARPED),
        ("all tokens but the top_k", "logits < least", "logits >= least", checks.WARPED),
        (
            "the likeliest token not counted towards top_p",
            "cumsum(-1) - probabilities",
            "cumsum(-1) - probabilities[:, :1]",
            checks.WARPED,
        ),
        ("tokens in the order of their probability", "scatter(-1, tokens, ", "add(", checks.WARPED),
        ("not normalised again", " / kept.sum(-1, keepdim=True)", "", checks.WARPED),
    ),
    *mistakes_in(
        "generate.make_sampler",
        ("seed ignored", "[seed, numbers[index], step]", "[numbers[index], step]", checks.DRAWN_APART),
        ("the place in the batch, not the row", "numbers[index]", "numbers[0]", checks.DRAWN_APART),
        ("one draw for all steps", "numbers[index], step]", "numbers[index]]", checks.DRAWN_APART),
        ("likely tokens only", "1 - np.random", "0.5 - 0.5 * np.random", checks.FREQUENT),
    ),
    *mistakes_in(
        "generate.prefill",
        (
            "every few prompts in the first rows of the cache",
            "select(cache, group)",
            "select(cache, slice(0, len(tokens)))",
            checks.generation("llama31"),
        ),
        ("padding counted", "lengths=counts)", "lengths=counts * 0 + counts.max())", checks.generation("llama31")),
    ),
    *mistakes_in(
        "generate.is_finished",
        (
            "only the first EOS id ends",
            "tokens[-1] in tokenizer.stops",
            "tokens[-1] == tokenizer.eos",
            checks.EOS,
        ),
        ("a stop string only at the end of the text", "string in text", "text.endswith(string)", checks.MIDDLE),
    ),
    *mistakes_in(
        "generate.select",
        ("lengths of the wrong rows", "cache.lengths[rows]", "cache.lengths[: len(keys[0])]", checks.STOPPING),
    ),
    *mistakes_in(
        "generate.complete",
        (
            "EOS kept",
            "tokens[:-1] if tokens and tokens[-1] in tokenizer.stops else tokens",
            "tokens",
            checks.EOS,
        ),
        ("stop string kept", "text[:cut]", "text", checks.STOP_STRING),
        ("cut at the last stop string", "min((text", "max((text", checks.FIRST_STOP),
    ),
]

DISTILLATION = [
    *mistakes_in(
        "baselines.sdft.rejection_reason",
        ("an empty text taken", "if not text:", "if False:", checks.LEFT),
        ("banned phrases in lower case only", "in text.lower()", "in text", checks.LEFT),
        (
            "no answer to a small your turn",
            'text.startswith("Your turn")',
            'text.lower().startswith("your turn")',
            checks.TAKEN,
        ),
        ("the number not looked at", "if recipe.same_number and", "if False and", checks.LEFT),
        ("the number looked at everywhere", "recipe.same_number and", "", checks.TAKEN),
    ),
    *mistakes_in(
        "baselines.sdft.same_integer",
        (
            "compared as strings",
            "int(last_integer(text)) == int(last_integer(reference))",
            "last_integer(text) == last_integer(reference)",
            checks.AGREE,
        ),
        ("what is no number agrees", "return False", "return True", checks.AGREE),
    ),
    *mistakes_in(
        "baselines.sdft.last_integer",
        ("the first number", "found[-1]", "found[0]", checks.INTEGERS),
        ("18.50 is 18", 'NO_INTEGER if decimals.strip("0") else whole', "whole", checks.INTEGERS),
        ("18.00 is none", 'decimals.strip("0")', "decimals", checks.INTEGERS),
        ("commas kept", '.replace(",", "")', "", checks.INTEGERS),
        ("spaces kept", '.replace(" ", "")', "", checks.INTEGERS),
    ),
    *mistakes_in(
        "baselines.sdft.choose_answer",
        ("the reference stripped too", "reference if fault", "reference.strip() if fault", checks.LEFT),
        ("the text not stripped", "else text.strip()", "else text", checks.TAKEN),
    ),
]

BASELINES = [
    *mistakes_in(
        "baselines.regularisers.neftune",
        ("twice the noise", "noise=noise", "noise=2 * noise", checks.NEFTUNE),
    ),
    *mistakes_in(
        "baselines.regularisers.uniform_noise",
        ("padded length", "math.sqrt(length * width)", "math.sqrt(batch.tokens.shape[1] * width)", checks.NOISE),
    ),
    *mistakes_in(
        "baselines.regularisers.gem_loss",
        ("q carries a gradient", "logits.detach() / beta", "logits / beta", checks.GEM),
        ("temperature forgotten", "logits.detach() / beta", "logits.detach()", checks.GEM),
        ("w carries a gradient", "gaps.detach()", "gaps", checks.GEM),
        (
            "reversed gaps",
            "logits - logits.gather(-1, answers[:, None])",
            "logits.gather(-1, answers[:, None]) - logits",
            checks.GEM,
        ),
        ("always linear", 'weight == "logsigmoid"', "False", checks.GEM),
        ("sum over tokens", ".mean()", ".sum()", checks.GEM),
    ),
    *mistakes_in(
        "baselines.regularisers.sam",
        ("descent", "alpha), batch", "-alpha), batch", checks.SAM),
        ("gradient of the start", "ascend(task, ascent, alpha)", "task", checks.SAM),
    ),
    *mistakes_in(
        "baselines.regularisers.feature_regulariser",
        ("λ forgotten", "lam * penalty", "penalty", checks.penalty("l2", "mean")),
        ("penalty alone", "sft + ", "", checks.penalty("l2", "mean")),
    ),
    *mistakes_in(
        "baselines.regularisers.feature_penalty",
        ("L2 for L1", "ord=order", "ord=2", checks.penalty("l1", "mean")),
        ("divided by D, not by its root", "** (1 / order)", "", checks.penalty("l2", "mean")),
        (
            "every position",
            "mask.nonzero(as_tuple=True)",
            "torch.ones_like(mask).nonzero(as_tuple=True)",
            checks.penalty("l2", "sum"),
        ),
        ("mean over tokens for the sum", "sizes.sum() / len(mask)", "sizes.sum(0).mean()", checks.penalty("l1", "sum")),
    ),
    *mistakes_in(
        "baselines.regularisers.logit_divergence",
        (
            "reversed divergence",
            "divergence(F.log_softmax(moved, dim=-1), F.log_softmax(z, dim=-1))",
            "divergence(F.log_softmax(z, dim=-1), F.log_softmax(moved, dim=-1))",
            checks.LOGITS,
        ),
        (
            "without the final norm",
            "rms_norm(h[-1][positions], base.norm, config.rms_norm_eps)",
            "h[-1][positions]",
            checks.LOGITS,
        ),
        ("the block before", "h[-1][positions]", "h[-2][positions]", checks.LOGITS),
        ("every position", "positions = mask", "positions = torch.ones_like(mask)", checks.LOGITS),
        (
            "logits rounded, not their difference",
            "z + frozen_linear(n_perturbed - n.detach(), base.lm_head)",
            "frozen_linear(n_perturbed, base.lm_head)",
            checks.bfloat16("logits"),
        ),
    ),
    *mistakes_in(
        "baselines.released.released_lora",
        ("both passes rounded", "relative_to(record)", "base_product", checks.bfloat16("released")),
    ),
    *mistakes_in(
        "baselines.averages.ensemble",
        ("beta weighs the tuned model", "(1 - beta) * scale", "beta * scale", checks.ENSEMBLE),
    ),
    *mistakes_in(
        "baselines.averages.ema",
        ("beta weighs the present", "beta * a + (1 - beta) * c", "(1 - beta) * a + beta * c", checks.MOVING),
    ),
    *mistakes_in(
        "baselines.anchored.anchored",
        (
            "KL the other way round",
            'F.kl_div(F.log_softmax(logits, dim=-1), anchor, reduction="none", log_target=True)',
            'F.kl_div(anchor, F.log_softmax(logits, dim=-1), reduction="none", log_target=True)',
            checks.ANCHORED,
        ),
        (
            "the anchor carries a gradient",
            "anchor, reduction",
            "log_anchor(logits, predict(reference), anchor_alpha, space), reduction",
            checks.ANCHORED,
        ),
        ("the other sign", "terms.sum(dim=-1).mean()", "-terms.sum(dim=-1).mean()", checks.ANCHORED),
        ("cross-entropy beside it", "return divergence, {", "return sft + divergence, {", checks.ANCHORED),
        ("no snapshot: an anchor at every step", "if snapshot else task", "if not snapshot else task", checks.ANCHORED),
        (
            "the student's scale for the reference",
            "predict(reference)",
            "predict((reference[0], start[1]))",
            checks.ANCHORED,
        ),
    ),
    *mistakes_in(
        "baselines.anchored.answer_logits",
        ("one position late", "answer_mask(batch.labels)", "answer_mask(batch.labels).roll(1, 1)", checks.ANCHORED),
    ),
    *mistakes_in(
        "baselines.anchored.log_anchor",
        (
            "shares exchanged",
            "torch.lerp(near, far, alpha), dim=-1)",
            "torch.lerp(far, near, alpha), dim=-1)",
            checks.ANCHORED,
        ),
        (
            "shares of probabilities exchanged",
            "[1 - alpha, alpha]",
            "[alpha, 1 - alpha]",
            checks.anchored("probabilities"),
        ),
        ("probabilities for logits", 'if space == "logits":', 'if space != "logits":', checks.ANCHORED),
    ),
    *mistakes_in(
        "baselines.anchored.train_in_stages",
        ("old moments in a new stage", "optimizer.state.clear()", "pass", checks.STAGES),
        (
            "one snapshot for all stages",
            "if done == 0 and snapshot",
            "if start_step == stage == 0 and snapshot",
            checks.STAGES,
        ),
        ("a stage continued from its start", "settings, done):", "settings, 0):", checks.STAGES),
    ),
    *mistakes_in(
        "baselines.anchored.take_snapshot",
        ("the snapshot moves along", "getattr(pair, part).clone()", "getattr(pair, part)", checks.STAGES),
    ),
]

MUTANTS = [*MODEL, *LORA, *LOSS, *STEP, *BASELINES, *MEMORY, *BENCH, *LOOP, *DATA, *GENERATION, *DISTILLATION]
