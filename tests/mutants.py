"""Do the tests notice? Each mutant is the program with one mistake in it; the tests of its part must fail.

    python tests/mutants.py                  all of them: about ten minutes
    python tests/mutants.py attend Muon      those whose line, or mistake, has one of these words

It works on a copy of the project, prints one line for each mutant, and in the end how many were noticed. A mutant that
is left is a gap in the tests, unless it changes nothing that anybody could see; then it does not belong here.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# (what stands in story_llm.py, once; what stands there in the mutant; the test files that are to notice)
MUTANTS = [
    # steps 1 to 5
    ("right = at_least <= value < below", "right = at_least <= value", "step01 command_line"),
    ("right = value in choices", "right = True", "step01"),
    ('read_text("utf-8-sig")', 'read_text("utf-8")', "step02"),
    ("if space > 0 and cut < len(text):", "if space > 0:", "step02"),
    ("max(cut - 50, 0), cut + 1", "0, cut + 1", "step02"),
    ('["\'”’)\\]]*\\s|[。！？]', '["\'”’)\\]]*\\s|[！？]', "step02 step09"),
    ("self.ids.get(piece, self.ids[UNKNOWN])", "self.ids.get(piece, 0)", "step03"),
    ('                piece = " " + piece\n', "                pass\n", "step03 step09"),
    ("        if most < 2:\n", "        if most < 1:\n", "step04"),
    ("pair_count[pair] += sign * times[number]", "pair_count[pair] += sign", "step04"),
    ("best = min(pair for pair, count", "best = max(pair for pair, count", "step04"),
    ("encode_ordinary(text)      # ordinary", "encode(text)      # ordinary", "step04"),
    ("place = min(range(len(joined))", "place = max(range(len(joined))", "step04"),
    ("return window[..., :-1], window[..., 1:]", "return window[..., :-1], window[..., :-1]", "step05"),
    ("if val_text and len(corpus.val_ids) <= context_length:", "if False:", "step05 step10"),
    ("make_tokenizer(kind, train_text, val_text, **options)", "make_tokenizer(kind, text, **options)", "step05 step03"),
    # step 6
    ("return places > places[S - T:, None]", "return places >= places[S - T:, None] + 2", "step06"),
    ("/ math.sqrt(D)", "/ D", "step06 workshop_attention"),
    ("shares = F.dropout(shares, drop_rate)", "pass", "step06"),
    ("self.config.drop_rate if self.training else 0.0", "0.0", "step06"),
    ("if into_sum else 1\n", "if False else 1\n", "step06"),
    ("0.02 * math.sqrt(768 / config.emb_dim)", "0.02", "step06"),
    ("        nn.init.zeros_(layer.bias)\n", "        pass\n", "step06"),
    ('self.form = {"exact": "none", "tanh": "tanh"}[config.gelu]', 'self.form = "none"', "step06 extras_huggingface"),
    ("x = x + self.dropout(self.ff(self.norm2(x)))", "x = x + self.dropout(self.ff(x))", "step06"),
    ("x = x + self.dropout(self.att(self.norm1(x), cache))", "x = x + self.att(self.norm1(x), cache)", "step06"),
    ("return self.out_head(self.final_norm(x))", "return self.out_head(x)", "step06"),
    ("start = 0 if cache is None else cache.length", "start = 0", "step13"),
    # steps 8 and 9
    ("idx_cond = idx[:, -context_size:]", "idx_cond = idx[:, -context_size + 1:]", "step08"),
    ("ignore_index=IGNORED)", "ignore_index=-1)", "step09 step10"),
    ("total += batch_loss(model, inputs, targets).item() * len(some)",
     "total += batch_loss(model, inputs, targets).item() * len(chosen)", "step09"),
    ("if len(ends) >= 8:", "if len(ends) >= 9:", "step09"),
    ("text[ends[4]:ends[4] + 80]", "text[ends[4]:ends[4] + 79]", "step09"),
    ("hits += text.startswith(wanted)", "hits += wanted.startswith(text)", "step09"),
    # step 10
    ("    run.optimizer.zero_grad() ", "    pass ", "step10"),
    ("config.grad_clip)\n    for group", "1e9)\n    for group", "step10"),
    ('"weight_decay": config.weight_decay},', '"weight_decay": 0.0},', "step10"),
    ("    check_finite(run.loss + length.item(), run)", "    check_finite(run.loss, run)", "step10"),
    ("warmup = min(config.warmup_steps, total_steps // 10)", "warmup = config.warmup_steps", "step10"),
    ("(total_steps - step) / (total_steps - warmup)", "(total_steps - step) / total_steps", "step10"),
    ("self.starts = (pieces * T + deal(T, n_windows, turns, seed + 1))", "self.starts = (pieces * T)", "step10"),
    ("start + 32 * self.length]", "start + self.length]", "step10"),
    ("cards = torch.cat([torch.randperm(count, generator=generator) for", "cards = torch.cat([torch.arange(count) for",
     "step10"),
    ("if run.history and run.history[-1].step == run.step:", "if False:", "step10 interruption"),
    ("seed, run.step, *names, device=device", "seed, *names, device=device", "step10"),
    ('able.get("avx512_bf16") or able.get("amx_bf16")', 'False', "step10"),
    # Muon
    ("length = 0.2 * math.sqrt(steps.shape[2])", "length = 0.2 * math.sqrt(steps.shape[1])", "workshop_muon"),
    ("    X = polynomial(X, gram / largest, 7.711, -22.114, 16.249)\n", "", "workshop_muon"),
    ("polynomial(X, X @ X.mT, 3.215", "polynomial(X, gram / largest, 3.215", "workshop_muon"),
    ('            group["lr"] *= MUON_STRIDE\n', "            pass\n", "workshop_muon"),
    ("return weight.grad.lerp(mean, MUON_MEMORY)", "return mean", "workshop_muon"),
    ("weight.mul_(1 - lr * decay)", "pass", "workshop_muon"),
    ("torch.bfloat16 if bf16 else torch.float32", "torch.bfloat16", "workshop_muon"),
    ("            weight.grad = None\n", "            pass\n", "workshop_muon step10"),
    ("usual = math.ceil(usual * MUON_READINGS)", "pass", "workshop_muon"),
    ('            shapes = {"momentum_buffer": shape}\n', "            pass\n", "workshop_muon step10"),
    # steps 11 and 12, and files
    ("os.replace(temporary, path)", "shutil.copy(temporary, path)", "step11"),
    ("            os.fsync(file.fileno())\n", "            pass\n", "step11"),
    ("temporary.unlink(missing_ok=True) ", "pass ", "step11"),
    ('check(digest.digest() == file.read(), "its checksum is wrong")', "pass", "step11"),
    ("weights_only=True)", "weights_only=False)", "step11"),
    ("check(4 * numbers <= size,", "check(True,", "step11"),
    ("if not math.isclose(found, expected_loss, rel_tol=1e-4):", "if False:", "step11"),
    ('path = Path(os.path.realpath(path))', 'path = Path(path)', "step11"),
    ("if load_checkpoint(path).fingerprint == run.fingerprint:", "if True:", "step11 command_line interruption"),
    ("if None not in values:", "if True:", "step12"),
    # step 13
    ("keys = torch.cat([old_keys, keys], dim=2)", "keys = torch.cat([keys, old_keys], dim=2)", "step13"),
    ("        self.length = keys.shape[2]\n", "        self.length += 1\n", "step13"),
    ("in_order[..., sampling.top_k:] = 0", "in_order[..., sampling.top_k + 1:] = 0", "step13"),
    ("in_order[likelier >= sampling.top_p] = 0", "in_order[likelier > sampling.top_p] = 0", "step13"),
    ("probabilities = (logits / temperature)", "probabilities = (logits * temperature)", "step13"),
    ("manual_seed(sampling.seed)", "manual_seed(42)", "step13 command_line"),
    ('if not text.endswith("\\ufffd"):', "if True:", "step13"),
    ("model.train(was_training)", "model.train(True)", "step13 step09"),
    # workshop: positions
    ("first * angles.cos() - second * angles.sin()", "first * angles.cos() + second * angles.sin()", "workshop_attention"),
    ("turn(queries, angles[-queries.shape[-2]:])", "turn(queries, angles[:queries.shape[-2]])", "workshop_attention step13"),
    ("angles = position_angles(*keys.shape[-2:], keys.device)",
     "angles = position_angles(*keys.shape[-2:], keys.device).to(keys.dtype)", "workshop_attention"),
    ("keys, values, ~mask, drop_rate)", "keys, values, ~mask)", "step06 workshop_attention"),
    # the command line
    ("CONTROL.sub(\"\\ufffd\", message) if file.isatty() else message", "message", "command_line"),
    ("signals = (signal.SIGINT, signal.SIGTERM) if here else ()", "signals = (signal.SIGINT,) if here else ()", "interruption"),
    ("        last = stop or run.step >= run.total_steps\n", "        last = run.step >= run.total_steps\n", "interruption"),
    ("[:run.config.context_length]\n    run.model", "[-run.config.context_length:]\n    run.model", "interruption"),
    ("TrainConfig(learning_rate=1.25e-3), args)", "TrainConfig(), args)", "interruption"),
    ("        elif asking:\n", "        else:\n", "command_line"),
    ("    except KeyboardInterrupt:\n        return 130\n", "    except KeyboardInterrupt:\n        return 1\n", "interruption"),
    # what is new since
    ("(?:(?!{UNSPACED})[", "(?:[", "step04"),
    ("2 * pieces > len(some)", "9 * pieces > 2 * len(some)", "step04"),
    ("max(45, run.total_steps // 20)", "45", "step10"),
    ("draft[max(0, len(row) - T):][:T]", "draft[:T]", "step09"),
    ("    if draft[:len(row)] != row: ", "    if False: ", "step09"),
    ("window[place + 1] == row[-1]:", "window[place + 1] != row[-1]:", "step09"),
    ("    place = min(len(row), T) - 1 ", "    place = len(row) - 1 ", "step09"),
    ("if text == wanted or not wanted.startswith(text):", "if True:", "step09"),
    ("1.04 * gram.norm", "0.9 * gram.norm", "workshop_muon"),
    ("if len(lines) > 10 * len(starts):", "if False:", "step02"),
    ("if len(lines) > 10 * len(starts):", "if len(lines) > len(starts):", "step02"),
    ("              if recall_exercises(text) else None)", "              )", "step10"),
    ("before = {**USUAL, **asdict(run.train_config), **asdict(run.config), **run.asked}", "before = {**USUAL, **run.asked}",
     "interruption"),
    ("    except (ImportError, torch.OutOfMemoryError): ", "    except KeyError: ", "command_line"),
    ('if "memory" not in str(error):', "if False:", "command_line"),
    ('meaning = meaning.replace("%", "%%")', "pass", "command_line"),
    ("if not old.exists():", "if True:", "command_line"),
]
SCALE_MUTANTS = [       # the same of extras/scale.py
    ("self.agreed = sum_of_all(self.asked, run.model.tok_emb.weight.device) > 0", "self.agreed = self.asked", "extras_scale"),
    ("precision_of(run, RANK, part)", "precision_of(run, part)", "extras_scale"),
    ("precision_of(run, RANK, part)", "precision_of(run, RANK)", "extras_scale"),
    ("(PROCESSES * loss).backward()", "loss.backward()", "extras_scale"),
    ("more = -head.out_features % 64", "more = 0", "extras_scale"),
    ("more = -len(inputs) % self.n_parts", "more = 0", "extras_scale"),
    ("value=IGNORED)", "value=0)", "extras_scale"),
    ("[..., :head.out_features]", "", "extras_scale"),
    ("        with self.without_sharing(): ", "        if True: ", "extras_scale"),
    ('init_process_group("gloo")', "init_process_group()", "extras_scale"),
    ("story_llm.check_finite(run.loss + length_before.item(), run)", "pass", "extras_scale"),
    ("    torch.cuda.set_device(LOCAL_RANK) ", "    pass ", "extras_scale"),
    ("answer = letter[0]", "pass", "extras_scale"),
]


def failing(project, names):
    """Whether one of these test files fails, or cannot even be collected."""
    files = [str(path) for name in names.split() for path in sorted(project.glob(f"tests/test_{name}*.py"))]
    assert files, names
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files], cwd=project,
                          env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode != 0


def main(words):
    chosen = [mutant for mutant in MUTANTS + SCALE_MUTANTS if not words or any(word in line for word in words for line in mutant[:2])]
    left = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "story_llm")
        shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".git", "__pycache__", ".hypothesis"))
        for old, new, names in chosen:
            path = project / ("story_llm.py" if (old, new, names) in MUTANTS else "extras/scale.py")
            program = path.read_text(encoding="utf-8")
            assert program.count(old) == 1, f"this must stand in {path.name} once, not {program.count(old)} times: {old}"
            path.write_text(program.replace(old, new), encoding="utf-8")
            noticed = failing(project, names)
            path.write_text(program, encoding="utf-8")
            left += [] if noticed else [old]
            print("noticed" if noticed else "LEFT   ", repr(old.strip())[:60], "->", repr(new.strip())[:40], flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - len(left)} noticed, {len(left)} left")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
