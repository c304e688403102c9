"""Mutation testing: do the tests notice mistakes? Each mutant is the program with one mistake in
it, and the tests of that part must fail.

    python tests/mutants.py                         all mutants, which takes long
    python tests/mutants.py causal_mask Muon        those that have one of these words in their text
    python tests/mutants.py --check                 only check that every mutant can be made

It works on a copy of the project, prints a line for every mutant, and at the end how many were
killed. A mutant that survives is a gap in the tests, unless its mistake makes no difference that
anybody could notice. Such a mutant does not belong here.
"""
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Each mutant is (a text that occurs once in story_llm.py, its replacement, the test files of which
# one must fail). "step01" stands for tests/test_step01*.py.
MUTANTS = [
    # settings and checks
    ("and lowest <= value < bound", "and lowest <= value", "step01"),
    ("valid, allowed = value in CHOICES[f.name],", "valid, allowed = True,", "step01"),
    ("valid = type(value) in (int, f.type) and", "valid = isinstance(value, (int, f.type)) and", "step01"),
    ("valid, allowed = type(value) is f.type,", "valid, allowed = True,", "step01"),
    ("for name in values if name in names})", "for name in values})", "step01"),
    ("    if n_bytes < 60_000:\n", "    if n_bytes < 6_000:\n", "step01"),
    ("check(rest == 0,", "check(True,", "step01"),
    ("check(settings.position != \"rotary\" or per_head % 2 == 0,", "check(True,", "step01"),

    # step 2: text, words and sentences
    ('return best.removeprefix("\\ufeff")', "return best", "step02"),
    ("data.count(10, 0, position) + 1", "data.count(10, 0, position)", "step02"),
    ('text = "\\n\\n".join(texts)', 'text = "".join(texts)', "step02"),
    ('sorted(Path(path).glob("*.txt"))', 'sorted(Path(path).glob("*"))', "step02"),
    ('sys.stdin.buffer.read() if file == "-" else', 'b"" if file == "-" else', "step02"),
    ("check(not data.startswith(beginning),", "check(True,", "step02"),
    ('errors="replace" if encoding else "strict"', 'errors="strict"', "step02"),
    ('if not encoding and (b"\\0" in data or', "if not encoding and (", "step02"),
    ("return len(CONTROL.findall(text)) + len({", "return len({", "step02"),
    ("(text)) + len({ord(character) >> 8 for character in set(text)})", "(text))", "step02"),
    ("if space > 0 and cut < len(text):", "if space > 0:", "step02"),
    ("max(cut - 50, 0), cut + 1)", "0, cut + 1)", "step02"),
    (r'LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}', r'LETTER = rf"[[\p{{L}}\p{{N}}', "step02"),
    ("      | [。！？]", "      | [！？]", "step02"),
    (r"[^\S\n]*+ (?!\n)", r"[^\S\n]*+", "step02"),
    (r"[\p{P}\s]{0,9} \p{Ll}", r"\p{Ll}", "step02"),
    ("mr|mrs|ms|dr|st|prof", "mr|mrs", "step02"),
    (r"(?!I)\p{{Lu}}", r"\p{{Lu}}", "step02"),
    (r" | (?!I)\p{{Lu}}", "", "step02"),
    (r"\s?» | ", "", "step02"),
    ("{GAP} (?! {LOWER} )", "{GAP}", "step02"),
    (r"{GAP} (?!\.)", "{GAP}", "step02"),
    ("if len(lower) <= len(matches) / 2:", "if True:", "step02"),
    ("if len(lower) <= len(matches) / 2:", "if False:", "step02"),
    (' or match["plain"] is None]', "]", "step02"),
    ("if len(lines) > 10 * len(starts):", "if False:", "step02"),
    ("if len(lines) > 10 * len(starts):", "if len(lines) > len(starts):", "step02"),
    ("for start in starts if start < len(text)] or [0]", "for start in starts] or [0]", "step02"),

    # step 3: the word tokenizer
    ("self.ids.get(piece, self.ids[UNKNOWN])", "self.ids.get(piece, 0)", "step03"),
    ('                piece = " " + piece\n', "                pass\n", "step03"),
    ("sorted(set(split_words(text)))", "list(dict.fromkeys(split_words(text)))", "step03"),

    # step 4: byte-pair encoding
    ("    if highest < 2:\n", "    if highest < 1:\n", "step04"),
    ("return min(pair for pair, count", "return max(pair for pair, count", "step04"),
    ("pair_counts[pair] += count\n", "pair_counts[pair] += 1\n", "step04"),
    ("pair_counts[pair] += sign * word_counts[index]", "pair_counts[pair] += sign", "step04"),
    ("            count_pairs(index, -1)\n", "            pass\n", "step04"),
    ("tokens = sorted(ALL_BYTES)\n    while len(tokens) < vocab_size - 1:",
     "tokens = sorted(ALL_BYTES)\n    while len(tokens) < vocab_size:", "step04"),
    ("token_ids += self.encoding.encode_ordinary(part)",
     'token_ids += self.encoding.encode(part, allowed_special="all")', "step04"),
    (r"(?:(?<=\S)(?= \S)|\Z)|", r"(?:(?= )|\Z)|", "step04"),
    (r"(?:(?<=\S)(?= \S)|\Z)|", r"(?:(?<=\S)|\Z)|", "step04"),
    ("(?:(?!{UNSPACED})[", "(?:[", "step04"),
    (r"[\p{{L}}\p{{M}}\u200c\u200d]){{1,20}}", r"[\p{{L}}\p{{M}}\u200c\u200d])+", "step04"),
    ("train_bpe_fast(train_text[:MAX_BPE_CHARS], vocab_size)",
     "train_bpe_fast(train_text, vocab_size)", "step04"),
    ("best = min(merged, key=", "best = max(merged, key=", "step04"),
    ("            needed.add(best)\n", "            pass\n", "step04"),
    ("2 * len(encoding.encode_ordinary(sample)) > len(sample)",
     "9 * len(encoding.encode_ordinary(sample)) > 2 * len(sample)", "step04"),
    ("and required <= known and", "and", "step03 step04"),
    ("and len(known) == len(tokens)\n", "\n", "step03 step04"),

    # step 5: windows and corpora
    ("return window[..., :-1], window[..., 1:]", "return window[..., :-1], window[..., :-1]",
     "step05"),
    ("token_ids.unfold(0, context_length + 1, stride)",
     "token_ids.unfold(0, context_length + 1, 1)", "step05"),
    ("check(len(token_ids) > context_length,", "check(len(token_ids) >= context_length,", "step05"),
    ("if val_text and len(val_ids) <= context_length:", "if False:", "step05"),
    ("resolved = make_tokenizer(tokenizer, train_text,",
     "resolved = make_tokenizer(tokenizer, text,", "step05"),
    ("[*resolved.encode(train_text), resolved.end_of_text]", "resolved.encode(train_text)",
     "step05"),
    ('f"{len(train_text)} {train_text}{val_text}"', 'f"{train_text}{val_text}"', "step05"),

    # step 6: attention
    ("return positions > positions[S - T:, None]",
     "return positions >= positions[S - T:, None] + 2", "step06"),
    ("return positions > positions[S - T:, None]", "return positions > positions[:T, None]",
     "step06 step13"),
    ("keys.transpose(-2, -1) / math.sqrt(D)", "keys.transpose(-2, -1) / D", "step06"),
    ("weights = self.dropout(attention_weights(queries, keys, mask))",
     "weights = attention_weights(queries, keys, mask)", "step06"),
    ("return x.reshape(B, T, H, C // H).transpose(1, 2)", "return x.reshape(B, H, T, C // H)",
     "step06"),
    ("self.query = make_linear(C, C, config, bias=config.qkv_bias)",
     "self.query = make_linear(C, C, config, bias=True)", "step06 step07"),

    # step 6: the block and the model
    ('{"exact": "none", "tanh": "tanh"}[config.gelu]', '"none"', "step06"),
    ("return self.project(F.gelu(self.expand(x), approximate=self.approximate))",
     "return self.project(self.expand(x))", "step06"),
    # residual connections
    ("x = x + self.dropout(self.att(self.norm1(x), cache))",
     "x = self.dropout(self.att(self.norm1(x), cache))", "step06"),
    ("x = x + self.dropout(self.ff(self.norm2(x)))", "x = self.dropout(self.ff(self.norm2(x)))",
     "step06"),
    # dropout and norms
    ("x = x + self.dropout(self.att(self.norm1(x), cache))",
     "x = x + self.att(self.norm1(x), cache)", "step06"),
    ("x = x + self.dropout(self.ff(self.norm2(x)))", "x = x + self.dropout(self.ff(x))", "step06"),
    ("        x = self.dropout(x)\n        for block", "        for block", "step06"),
    ("return self.out_head(self.final_norm(x))", "return self.out_head(x)", "step06"),
    # initialization
    ("0.02 * math.sqrt(768 / config.emb_dim)", "0.02", "step06"),
    ("n_sums = 2 * config.n_layers if added_to_x else 1", "n_sums = 1", "step06"),
    ("        nn.init.zeros_(layer.bias)\n", "        pass\n", "step06"),
    ("nn.init.normal_(self.tok_emb.weight, std=init_std(config))",
     "nn.init.normal_(self.tok_emb.weight)", "step06"),
    # the model
    ("self.out_head.weight = self.tok_emb.weight", "pass", "step06"),
    ("check(end <= self.config.context_length,", "check(True,", "step06"),
    ("start = 0 if cache is None else cache.length", "start = 0", "step06 step13"),
    ("for p in module.parameters() if p.requires_grad)", "for p in module.parameters())", "step07"),

    # step 8: greedy generation
    ("idx_cond = idx[:, -context_size:]", "idx_cond = idx[:, -context_size + 1:]", "step08"),
    ("logits = logits[:, -1, :] ", "logits = logits[:, 0, :] ", "step08"),
    ("        with torch.no_grad():\n            logits = model(idx_cond)",
     "        with contextlib.nullcontext():\n            logits = model(idx_cond)", "step08"),

    # step 9: loss and recall
    ("ignore_index=IGNORE_INDEX)", "ignore_index=-1)", "step09"),
    ("total += batch_loss(model, *windows[part]).item() * len(part)",
     "total += batch_loss(model, *windows[part]).item() * len(indices)", "step09"),
    ("windows = SlidingWindowDataset(token_ids, T, stride=T)",
     "windows = SlidingWindowDataset(token_ids, T, stride=1)", "step09"),
    ("indices = torch.arange(count) * len(windows) // count", "indices = torch.arange(count)",
     "step09"),
    ("if len(words) >= 8:", "if len(words) >= 9:", "step09"),
    ("if word.end() >= length]", "if word.end() >= 60]", "step09"),
    ("rest[:min(ends, default=len(rest))]", "rest[:80]", "step09"),
    ("return items[::math.ceil(len(items) / count) or 1]", "return items[:count]", "step09"),
    ("if len(found) == 1 and prompt in prompts]", "if prompt in prompts]", "step09"),
    ("            if len(words) >= 8:\n", "            if True:\n", "step09"),
    ("loss / math.log(2) * len(token_ids)", "loss * len(token_ids)", "step09"),
    ("for i in token_ids.tolist() if i != tokenizer.end_of_text]", "for i in token_ids.tolist()]",
     "step09"),
    # recites
    ("return torch.cat([predictions[0], predictions[1:, -1]])",
     "return torch.cat([predictions[0], predictions[1:, 0]])", "step09"),
    ("predictions[n - 1:], token_ids[n:])", "predictions[n:], token_ids[n + 1:])", "step09"),
    ("predictions[n - 1:], token_ids[n:])", "predictions, token_ids[1:])", "step09"),
    ("return sum(hits) / max(len(tests), 1)", "return sum(hits) / len(tests)", "step09"),

    # step 10: the training step
    ("    run.optimizer.zero_grad() ", "    pass ", "step10"),
    ("    run.model.train()                   #", "    pass                   #", "step10"),
    ("    run.model.eval()                    #", "    pass                    #", "step10"),
    ("clip_grad_norm_(run.model.parameters(), config.grad_clip)",
     "clip_grad_norm_(run.model.parameters(), 1e9)", "step10"),
    ("check_finite(run, run.loss + norm.item())", "check_finite(run, run.loss)", "step10"),
    ("    check(math.isfinite(number),", "    check(True,", "step10"),
    ('"weight_decay": config.weight_decay},\n', '"weight_decay": 0.0},\n', "step10"),
    ('if p.dim() < 2], "weight_decay": 0.0}]', 'if p.dim() < 2], "weight_decay": 0.5}]', "step10"),
    # learning_rate
    ("warmup = min(config.warmup_steps, total_steps // 10)", "warmup = config.warmup_steps",
     "step10"),
    ("return config.learning_rate * (step + 1) / warmup",
     "return config.learning_rate * step / warmup", "step10"),
    ("(total_steps - step) / (total_steps - warmup)", "(total_steps - step) / total_steps",
     "step10"),
    # window_starts
    ("offset = torch.randint(T, (), generator=generator)", "offset = 0", "step10"),
    ("    while True:\n        offset = torch.randint(T, (), generator=generator)\n",
     "    offset = torch.randint(T, (), generator=generator)\n    while True:\n", "step10"),
    ("torch.randperm(math.ceil(n_starts / T), generator=generator)",
     "torch.arange(math.ceil(n_starts / T))", "step10"),
    ("torch.randperm(math.ceil(n_starts / T), generator=generator)",
     "torch.randperm(n_starts // T or 1, generator=generator)", "step10"),
    ("((pieces * T + offset) % n_starts)", "((pieces * T + offset).clamp(max=n_starts - 1))",
     "step10"),
    # shuffled
    ("for index in torch.randperm(len(items), generator=generator).tolist():",
     "for index in range(len(items)):", "step10"),
    ("    while True:\n        for index in",
     "    while True:\n        generator.manual_seed(seed)\n        for index in", "step10"),
    ("in torch.randperm(len(items), generator=generator)",
     "in torch.randint(len(items), (len(items),), generator=generator)", "step10"),
    # prompt_window
    ("end = start + 32 * (T + 1) ", "end = start + T + 1 ", "step10"),
    ("[IGNORE_INDEX] * (T + 1 - len(token_ids))", "[0] * (T + 1 - len(token_ids))", "step10"),
    # training_batches
    ("n_words = n_prompts // 5 ", "n_words = 0 ", "step10"),
    ("sentences = shuffled(sentence_starts(text),", "sentences = shuffled(word_starts(text),", "step10"),
    ("words = shuffled(word_starts(text),", "words = shuffled(sentence_starts(text),", "step10"),
    ("    while run.step < run.total_steps:\n", "    while run.step <= run.total_steps:\n", "step10"),
    ("        token_ids.append(corpus.tokenizer.end_of_text)\n", "        pass\n", "step10"),
    ("stream = islice(stream, size * skip, None)", "stream = islice(stream, 0, None)", "step10"),
    ("rows[:, :-1].clamp(min=0)]", "rows[:, :-1]]", "step10"),
    # train and evaluate
    ("    if run.step == 0:\n        run.history = ", "    if True:\n        run.history = ",
     "step10"),
    ("        if evaluation_due(run):\n", "        if True:\n", "step10"),
    ("or max(45, run.total_steps // 20)", "or 45", "step10"),
    ("return run.step % every == 0 or run.step in milestones", "return run.step % every == 0",
     "step10"),
    ("share_recited(run.model, run.tokenizer, tests) if tests else None",
     "share_recited(run.model, run.tokenizer, tests)", "step10"),
    # record_evaluation
    ("        record_evaluation(run, corpus)\n    for",
     "        run.history.append(evaluate(run, corpus))\n    for", "step10"),
    ("    if best is run.history[-1]:\n", "    if True:\n", "step10"),
    ("weight.detach().cpu().clone()", "weight.detach().cpu()", "step10"),
    ("if run.train_config.keep_best and run.step >= run.total_steps:", "if run.best_weights:", "step10"),
    ("if run.train_config.keep_best and run.step >= run.total_steps:", "if False:", "step10"),
    ("        run.model.load_state_dict(run.best_weights)\n", "        pass\n", "step10"),
    ("or run.step - best.step > run.total_steps / 5:", "or run.step > best.step:", "step10"),
    ("check(run.history[-1].val_loss is not None,", "check(True,", "step10"),
    # runs
    ("T = min(config.context_length, n_tokens - 1)", "T = config.context_length", "step10"),
    ("    train_config = replace(train_config, val_fraction=corpus.val_fraction)\n", "", "step05 step10 step11 interruption"),
    ("model=new_model(config, train_config.seed)", "model=new_model(config)", "step10"),
    ("config.max_steps or config.epochs * steps_per_epoch or enough",
     "config.epochs * steps_per_epoch or config.max_steps or enough", "step10"),
    ("enough = max(epochs * steps_per_epoch, min_steps)", "enough = epochs * steps_per_epoch",
     "step10"),
    ("check(steps < 1 << 22,", "check(True,", "step10"),
    # precision and randomness
    ("run.train_config.seed, run.step, *names", "run.train_config.seed, *names", "step10"),
    ('any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))', "False", "step10"),
    ('with torch.random.fork_rng([device] if device.type == "cuda" else []):',
     "with contextlib.nullcontext():", "step06 step10"),

    # --preset writer
    ('if args.preset == "writer": ', "if False: ", "workshop_presets"),
    ("5 / math.sqrt(max(n_bytes / 100_000, 1))", "5 / math.sqrt(n_bytes / 100_000)", "workshop_presets"),
    ("5 / math.sqrt(max(n_bytes / 100_000, 1))", "5", "workshop_presets"),
    # prepare_inference, allow_tf32, seeded_rng
    ("if packable and count_parameters(model) > 4_000_000:", "if packable:", "workshop_inference"),
    ("if packable and count_parameters(model) > 4_000_000:", "if False:", "workshop_inference"),
    ("    if in_bf16:\n        model.bfloat16()\n", "", "workshop_inference"),
    ("torch.backends.mkldnn.is_available()\n", "True\n", "workshop_inference"),
    ('hasattr(ops, "_linear_pointwise")', "True", "workshop_inference"),
    ("        setattr(settings, name, before)\n", "        pass\n", "workshop_inference"),
    ("    with allow_tf32(), collect_signals()", "    with collect_signals()", "workshop_inference"),
    ("            with torch.cuda.device(device):         #", "            if True:         #", "workshop_inference"),
    ('        raise RuntimeError("a model that was', '        print("a model that was', "workshop_inference"),
    ("                torch.mps.set_rng_state(state)\n", "                pass\n", "workshop_inference"),
    ("            torch.mps.manual_seed(seed)\n", "            pass\n", "workshop_inference"),
    ('else "mps" if mps else "cpu"', 'else "cpu"', "workshop_inference"),
    ('("generate", "precision"): "fp32"}', "}", "workshop_inference"),
    # Muon
    ('"muon": (10, 75)}', '"muon": (20, 150)}', "workshop_muon"),
    ("matrices = [p for p in model.trf_blocks.parameters()",
     "matrices = [p for p in model.parameters()", "workshop_muon"),
    ("scale = 0.2 * math.sqrt(max(weight.shape))", "scale = 0.2 * math.sqrt(min(weight.shape))",
     "workshop_muon"),
    ('            group["lr"] *= 4 ', "            pass ", "workshop_muon"),
    ("lerp_(weight.grad, 0.1)", "lerp_(weight.grad, 0.2)", "workshop_muon"),
    ("update = weight.grad.lerp(momentum, 0.9)", "update = momentum.clone()", "workshop_muon"),
    ("weight.mul_(1 - lr * weight_decay).sub_(", "weight.sub_(", "workshop_muon"),
    ("update.bfloat16() if self.bf16 else update", "update.bfloat16()", "workshop_muon"),
    # newton_schulz
    ("((7.711, -22.114, 16.249), (3.215, -2.411, 0.501))", "((3.215, -2.411, 0.501),)",
     "workshop_muon"),
    ("((7.711, -22.114, 16.249), (3.215, -2.411, 0.501))", "((7.711, -22.114, 16.249),)",
     "workshop_muon"),
    ("(b * gram + c * gram @ gram)", "(b * gram + c * gram)", "workshop_muon"),
    ("(1.04 * (X @ X.mT).norm()).sqrt()", "(0.9 * (X @ X.mT).norm()).sqrt()", "workshop_muon"),
    ("return newton_schulz(X.mT).mT ", "return newton_schulz(X.mT) ", "workshop_muon"),
    (".sqrt().clamp(min=1e-10)", ".sqrt()", "workshop_muon"),

    # step 11: checkpoint files
    ("        os.replace(temporary, path)\n", "        path.write_bytes(temporary.read_bytes())\n",
     "step11"),
    ("            temporary.unlink()          # after", "            pass          # after", "step11"),
    ("path = Path(os.path.realpath(path))\n    temporary", "path = Path(path)\n    temporary", "step11"),
    ("return run.saved_optimizer if run.optimizer is None",
     "return None if run.optimizer is None", "step10 step11"),
    ('load_state_dict({**saved, "param_groups": groups})', "load_state_dict(saved)", "step10"),
    ('check([group["params"] for group in groups] ==', "check(True or", "step10"),
    ('    run.optimizer.load_state_dict({**saved, "param_groups": groups})\n', "    pass\n",
     "step10 interruption"),
    # read_checkpoint
    ('check(sum(entry.file_size for entry in entries) <= size, "it is compressed")', "pass",
     "step11"),
    ("check(not any(entry.external_attr & 0x10 for entry in entries),", "check(True,", "step11"),
    ('check(archive.testzip() is None, "a checksum is wrong")', "pass", "step11"),
    ('map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)', "step11"),
    ('check(isinstance(saved, dict) and "format" in saved,', "check(True,", "step11 errors"),
    ('check(saved["format"] == FORMAT,', "check(True,", "step11"),
    ('check(saved["step"] >= 0 and saved["steps_per_epoch"] > 0,', "check(True,", "step11"),
    ("check(shapes[0] == shapes[1] == shapes[2],", "check(True,", "step11"),
    ("check(shapes[0] == shapes[1] == shapes[2],", "check(shapes[0] == shapes[2],", "step11"),
    ("check(all(type(string) is str for string in strings),", "check(True,", "step11"),
    ("        model(torch.zeros(1, 1, dtype=torch.long)) ", "        pass ", "errors"),
    ("check(4 * sum(weight.numel() for weight in model.parameters()) <= size", "check(True",
     "step11"),
    ('and saved["tokenizer"].vocab_size == saved["config"].vocab_size', "and True", "step11"),
    ("check(math.isclose(found, expected, rel_tol=1e-4),", "check(True,", "step11 errors"),
    ('check(math.isfinite(loss), "the model computes', 'check(True, "the model computes', "step11"),
    # keep_previous_model
    ("if same and previous.train_config", "if previous.train_config", "step11 command_line"),
    ("if same and previous.train_config == run.train_config and", "if same and",
     "step11 command_line"),
    ("previous.train_config == run.train_config and previous.step <= run.step:",
     "previous.train_config == run.train_config:", "step11 command_line"),
    ("        if not unused.exists():\n", "        if True:\n", "command_line"),
    ("check(os.path.isfile(path) or not os.path.lexists(path),", "check(True,", "errors"),

    # step 12: loss curves
    ("if None not in values:", "if True:", "step12"),
    ("if evaluation.val_loss is not None]", "]", "step12"),
    ('os.environ["MPLBACKEND"] = "agg"', "pass", "step12"),
    ("check(not endings or path.suffix.lower() in endings,", "check(True,", "step12"),

    # step 13: the cache and sampling
    ("keys = torch.cat([old_keys, keys], dim=2)", "keys = torch.cat([keys, old_keys], dim=2)",
     "step13"),
    ("        self.length = keys.shape[2]\n", "        self.length += 1\n", "step13"),
    ("window = token_ids[:, -context_length:].cpu()", "window = token_ids.cpu()", "step13"),
    ("            window = window[:, 1:]\n            cache = KeyValueCache()\n",
     "            window = window[:, 1:]\n", "step13"),
    ("if sampling.temperature < 1e-4:     # as good as 0\n        return F.one_hot",
     "if False:\n        return F.one_hot", "step13"),
    ("(logits / sampling.temperature)", "(logits * sampling.temperature)", "step13"),
    ("sorted_probs[..., sampling.top_k:] = 0", "sorted_probs[..., sampling.top_k + 1:] = 0",
     "step13"),
    ("        sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True)\n", "", "step13"),
    ("sum_before >= sampling.top_p]", "sum_before > sampling.top_p]", "step13"),
    ("torch.Generator().manual_seed(sampling.seed)", "torch.Generator().manual_seed(42)",
     "step13 command_line"),
    # predict_next
    ("logits = model(window[:, cache.length:], cache)[:, -1, :]",
     "logits = model(window, KeyValueCache())[:, -1, :]", "step13"),
    ("logits = model(window[:, cache.length:], cache)[:, -1, :]",
     "logits = model(window[:, -1:], cache)[:, -1, :]", "step13"),
    # generate_text
    ("decoder.decode(tokenizer.decode_bytes(new_ids.tolist()))",
     "tokenizer.decode(new_ids.tolist())", "step13"),
    ("        if new_ids.item() == tokenizer.end_of_text:\n            break\n", "", "step13"),
    ('superfluous = " " if prompt.endswith(" ") else ""', 'superfluous = ""', "step13"),
    ('        superfluous = ""\n', "", "step13"),
    ("if text[len(prompt):i].strip()]", "if i > len(prompt)]", "step13"),
    ("end = len(text[:min(later, default=end)].rstrip())", "end = min(later, default=end)",
     "step13"),
    ("later = starts[sentences - 1:]", "later = starts[sentences:]", "step13"),
    ("        if later:\n            return\n", "", "step13"),
    ('tokenizer.encode(prompt.rstrip(" ") or prompt)', "tokenizer.encode(prompt)", "step13"),
    # Run
    ('Sampling(**{"temperature": 1.0, **sampling})', "Sampling(**sampling)", "step13"),
    ("    __repr__ = str.__str__\n", "    pass\n", "step13"),
    ("encode_prompt(self.tokenizer, prompt)[-self.config.context_length:]",
     "encode_prompt(self.tokenizer, prompt)", "step13"),
    ('check(token_ids, f"the prompt {prompt!r}', 'check(True, f"the prompt {prompt!r}', "step13"),

    # other positions, fused attention
    ("first * cos - second * sin", "first * cos + second * sin", "workshop_attention"),
    ("rotate_by(queries, angles[-queries.shape[2]:])",
     "rotate_by(queries, angles[:queries.shape[2]])", "workshop_attention step13"),
    ("angles = position_angles(keys.shape[2], keys.shape[3], keys.device)",
     "angles = position_angles(keys.shape[2], keys.shape[3], keys.device).to(keys.dtype)",
     "workshop_attention"),
    ('if config.position == "sinusoidal" else 0.0', "if True else 0.0", "workshop_attention"),
    ("freeze=True)", "freeze=False)", "step07 workshop_attention"),
    ("    return ~mask, False\n", "    return None, False\n", "workshop_attention step06"),
    ("        return None, True\n", "        return None, False\n", "workshop_attention step06"),
    ("drop_rate = dropout.p if dropout.training else 0.0", "drop_rate = 0.0",
     "step06 workshop_attention"),
    ("drop_rate = dropout.p if dropout.training else 0.0", "drop_rate = dropout.p",
     "step06 workshop_attention"),

    # Progress
    ('for name in ("SIGINT", "SIGTERM", "SIGHUP"):', 'for name in ("SIGINT", "SIGTERM"):', "interruption"),
    ("    if threading.current_thread() is threading.main_thread():\n", "    if True:\n", "interruption"),
    ("if number is not None and signal.getsignal(number) != signal.SIG_IGN:", "if number is not None:", "interruption"),
    ("            os.write(sys.__stderr__.fileno(),", "            bytes.join(b'',", "interruption"),
    ("if None not in (signature, self.written) and signature != self.written:", "if False:",
     "interruption"),
    ("if None not in (signature, self.written) and", "if", "interruption"),
    ("self.next_line = now + 0.2", "self.next_line = now", "command_line"),
    ("signal.signal(number, signal.default_int_handler)", "pass", "interruption"),
    ("            signal.signal(number, handler)\n", "            pass\n", "interruption"),
    ("is_last=stop or run.step >= run.total_steps)", "is_last=run.step >= run.total_steps)",
     "interruption"),
    ("if is_last or (evaluations and now > self.next_save):", "if is_last:", "interruption"),
    ("file_signature(path) if resumed else None", "file_signature(path)", "command_line"),
    ("file_signature(path) if resumed else None", "None", "interruption"),
    ("self.shown = len(run.history)       #", "self.shown = 0       #", "interruption"),

    # the command line
    ('message = CONTROL.sub("\\ufffd", message) if file.isatty() else message', "pass",
     "command_line"),
    ("        if kind != required:\n", "        if False:\n", "command_line"),
    ('    args.given["tokenizer"] = "word"\n', "    pass\n", "command_line"),
    ("refuse_options(args, args.given.keys() - set(RESUME_OPTIONS),", "refuse_options(args, (),",
     "interruption"),
    ("check(corpus.fingerprint == run.fingerprint,", "check(True,", "interruption"),
    ("        run.train_config = replace(run.train_config, max_steps=0)\n", "        pass\n",
     "interruption"),
    ("        run.total_steps = count_steps(run.steps_per_epoch, run.train_config)\n", "        pass\n",
     "interruption"),
    ('run.text_paths, run.encoding = list(args.given.get("text", ())), args.encoding',
     "run.text_paths, run.encoding = [], args.encoding", "interruption"),
    ('run.text_paths, run.encoding = list(args.given.get("text", ())), args.encoding',
     'run.text_paths = list(args.given.get("text", ()))', "command_line"),
    ("    if corpus.fingerprint != run.fingerprint:\n", "    if False:\n", "command_line"),
    ("epoch = max(1, math.ceil(evaluation.epoch))", "epoch = int(evaluation.epoch) + 1",
     "command_line"),
    ("override_settings(Sampling(temperature=1.0), args.given)",
     "override_settings(Sampling(), args.given)", "command_line"),
    (r'yield line.rstrip("\r\n").replace("\\n", "\n")', r'yield line.replace("\\n", "\n")',
     "command_line"),
    (r'yield line.rstrip("\r\n").replace("\\n", "\n")', r'yield line.rstrip("\r\n")', "command_line"),
    (r'given["prompt"] = given["prompt"].replace("\\n", "\n") ', "pass ", "command_line"),
    ('if argv[i - 1] == "--prompt" and', "if False and", "command_line"),
    ("    if len(token_ids) > T:\n", "    if False:\n", "command_line"),
    ("beginning.startswith(prompt.rstrip()) or prompt.startswith(beginning)]", "beginning.startswith(prompt.rstrip())]",
     "command_line"),
    ("difflib.get_close_matches(prompt, similar, n=1)", "[]", "command_line"),
    ('word.split("=")[0], possible, 1)', "word, possible, 1)", "command_line"),
    ("close = [f\"{option_string(names[0])} {shlex.quote(word)}\"]", "close = [option_string(names[0])]",
     "command_line"),
    ("    if len(tests) < len(corpus.recall_tests):\n", "    if False:\n", "command_line"),
    ('check(os.environ.get("WORLD_SIZE", "1") == "1",', "check(True,", "errors"),
    ('model = ["--model", args.model] if "model" in args.given else []', "model = []", "command_line"),
    ("    if command is None and unknown:\n", "    if False:\n", "command_line"),
    ('names = [name for name in names_of(Sampling) if name != "temperature"]', "names = ['seed']", "command_line"),
    ('picture = "attention.png" if command == "attention" else "loss.png"', 'picture = "loss.png"',
     "command_line"),
    ('str(model.parent / f"{model.stem}_{picture}")', 'f"{model.stem}_{picture}"', "command_line"),
    ("refuse_options(args, given.keys() - set(options),", "refuse_options(args, (),",
     "command_line"),
    ('refuse_options(args, ["model"], "cannot', 'refuse_options(args, [], "cannot', "command_line"),
    ('help=text.replace("%", "%%")', "help=text", "command_line"),
    ("    override_settings(Options(), given) ", "    pass ", "command_line"),
    ("    except KeyboardInterrupt:\n        return 130\n",
     "    except KeyboardInterrupt:\n        return 1\n", "interruption"),
    ('if error.name not in ("tiktoken", "matplotlib"):', "if True:", "errors"),
    ("if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):",
     "if isinstance(error, RuntimeError):", "errors"),
    ('stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")', "pass", "command_line"),
    ("    except BrokenPipeError: ", "    except KeyError: ", "command_line interruption"),
]
SCALE_MUTANTS = [       # the same for extras/scale.py
    ("    torch.cuda.set_device(LOCAL_RANK) ", "    pass ", "extras_scale"),
    ('init_process_group("gloo")', "init_process_group()", "extras_scale"),
    ("result = message[0]", "pass", "extras_scale"),
    ("    if isinstance(result, StoryError):\n        raise result\n", "", "extras_scale"),
    ("n_padding = -head.out_features % 64", "n_padding = 0", "extras_scale"),
    ("[..., :head.out_features]", "", "extras_scale"),
    ("check(self.n_micro_batches <= batch_size,", "check(True,", "extras_scale"),
    ("n_padding = -len(inputs) % self.n_micro_batches", "n_padding = 0", "extras_scale"),
    ("value=IGNORE_INDEX)", "value=0)", "extras_scale"),
    ("        run.model.train()\n", "", "extras_scale"),
    ("        run.model.eval()\n", "", "extras_scale"),
    ("        with self.no_sync(): ", "        if True: ", "extras_scale"),
    ("            targets = targets.clamp(min=0)\n", "            pass\n", "extras_scale"),
    ("loss = share * self.batch_loss(inputs, targets)", "loss = self.batch_loss(inputs, targets)",
     "extras_scale"),
    ("dropout_seed(run, RANK, i)", "dropout_seed(run, i)", "extras_scale"),
    ("dropout_seed(run, RANK, i)", "dropout_seed(run, RANK)", "extras_scale"),
    ("(PROCESSES * loss).backward()", "loss.backward()", "extras_scale"),
    ("story_llm.check_finite(run, run.loss + norm.item())", "pass", "extras_scale"),
    ("stop = sum_over_processes(len(received), device) > 0", "stop = len(received) > 0", "extras_scale"),
    ("        time.sleep(5) ", "        pass ", "extras_scale"),
]
PROGRAMS = {"story_llm.py": MUTANTS, "extras/scale.py": SCALE_MUTANTS}

def find_tests(project, names):
    """The test files with these names, which must exist."""
    files = []
    for name in names.split():
        found = sorted(project.glob(f"tests/test_{name}*.py"))
        assert found, f"there are no tests/test_{name}*.py"
        files += found
    return files

def mutate(source, old, new, parsed=True):
    """The source of a mutant. The old text must occur once, and the mutant must be valid Python."""
    assert source.count(old) == 1, f"this must occur once, not {source.count(old)} times: {old}"
    mutant = source.replace(old, new)
    if parsed:
        ast.parse(mutant)
    return mutant

def check_mutants(parsed=True):
    """Check that every mutant can be made, and that its tests exist. (Parsing them all takes a while.)"""
    for program, mutants in PROGRAMS.items():
        source = (ROOT / program).read_text(encoding="utf-8")
        assert len(set(mutants)) == len(mutants), f"a mutant of {program} occurs twice"
        for old, new, names in mutants:
            mutate(source, old, new, parsed)
            find_tests(ROOT, names)

def is_killed(project, names):
    """Whether one of these test files fails, cannot be collected, or does not end."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
               *find_tests(project, names)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True,
                              timeout=600)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0

def main(words):
    check_mutants()
    if words == ["--check"]:
        return 0
    chosen = [(program, *mutant) for program, mutants in PROGRAMS.items() for mutant in mutants
              if not words or any(word in text for word in words for text in mutant[:2])]
    test_names = sorted({name for *_, names in chosen for name in names.split()})
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "story_llm")
        shutil.copytree(ROOT, project,
                        ignore=shutil.ignore_patterns(".git", "__pycache__", ".hypothesis"))
        for name in test_names:     # otherwise every mutant would seem to be killed
            assert not is_killed(project, name), f"tests/test_{name}*.py fail without a mutant"
        for program, old, new, names in chosen:
            path = project / program
            source = path.read_text(encoding="utf-8")
            path.write_text(mutate(source, old, new), encoding="utf-8")
            killed = is_killed(project, names)
            path.write_text(source, encoding="utf-8")
            survived += not killed
            print("killed  " if killed else "SURVIVED", repr(old.strip())[:60], "->",
                  repr(new.strip())[:40], flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - survived} killed, {survived} survived")
    return int(survived > 0)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
