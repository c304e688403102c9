"""--keep-best ends with the weights of the lowest validation loss, and stops when that no longer falls."""
import copy

import pytest

from helpers import TEXT, story_llm, tiny, train_to, weights_equal

OVERFITS = {"keep_best": True, "max_steps": 120, "eval_every": 4, "learning_rate": 5e-3}


def trained_with_snapshots(text=TEXT, **changed):
    """(the run at its end, {step: a copy of the model after the evaluation of that step})"""
    run, corpus = tiny(text, **{**OVERFITS, **changed})
    planned, snapshots = run.total_steps, {}
    record = story_llm.record_evaluation

    def record_and_copy(run, corpus):
        snapshots[run.step] = copy.deepcopy(run.model)
        record(run, corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story_llm, "record_evaluation", record_and_copy)
        train_to(run, corpus)
    return run, corpus, snapshots, planned


@pytest.fixture(scope="module")
def overfitted():
    return trained_with_snapshots()


def test_the_weights_at_the_end_are_those_of_the_lowest_validation_loss(overfitted):
    run, corpus, snapshots, _ = overfitted
    losses = {step: story_llm.evaluate(run_with(run, model), corpus).val_loss for step, model in snapshots.items()}
    best = min(losses, key=losses.get)
    assert 0 < best < max(losses), "this test needs a run that overfits"
    assert weights_equal(run.model, snapshots[best]) and not weights_equal(run.model, snapshots[max(losses)])
    assert story_llm.best_evaluation(run).step == best


def run_with(run, model):
    other = copy.copy(run)
    other.model = model
    return other


def test_training_stops_at_the_first_evaluation_that_is_a_fifth_of_all_steps_after_the_best(overfitted):
    run, _, snapshots, planned = overfitted
    losses = {evaluation.step: evaluation.val_loss for evaluation in run.history if evaluation.step > 0}
    waited = {step: step - min((loss, s) for s, loss in losses.items() if s <= step)[1] for step in losses}
    assert [step for step in waited if waited[step] > planned / 5] == [run.step]
    assert run.step < planned and run.total_steps == run.step == max(snapshots)


def test_without_it_training_goes_on_to_the_last_weights():
    run, _, snapshots, planned = trained_with_snapshots(keep_best=False)
    assert run.step == planned and weights_equal(run.model, snapshots[planned]) and run.best_weights is None


def test_a_validation_loss_that_only_rises_is_lowest_at_the_first_evaluation_after_step_0():
    """Every word of the validation split is unknown, so the model learns never to predict it."""
    run, _, snapshots, _ = trained_with_snapshots(TEXT + "Xa xb xc xd xe xf xg xh xi xj xk xl xm xn xo xp " * 3,
                                                  val_fraction=0.2, learning_rate=0.03)
    losses = [evaluation.val_loss for evaluation in run.history]
    first = min(snapshots)
    assert min(losses) == losses[0], "this test needs a validation loss that only rises"
    assert story_llm.best_evaluation(run).step == first and weights_equal(run.model, snapshots[first])


def test_a_resumed_training_remembers_the_best_weights(overfitted, tmp_path):
    uninterrupted, corpus, _, _ = overfitted
    best = story_llm.best_evaluation(uninterrupted).step
    run, _ = tiny(**OVERFITS)
    train_to(run, corpus, best + 2)
    story_llm.save_checkpoint(tmp_path / "run.pt", run)
    resumed = train_to(story_llm.load_checkpoint(tmp_path / "run.pt"), corpus)
    assert resumed.step == uninterrupted.step and weights_equal(resumed.model, uninterrupted.model)


def test_without_a_validation_split_it_is_refused():
    run, corpus = tiny(**OVERFITS, val_fraction=0.0)
    with pytest.raises(story_llm.StoryError, match="keep-best needs a validation split"):
        train_to(run, corpus)


@pytest.mark.parametrize("kb, expected", [(100, (2048, 0.3, 6)), (1115, (4096, 0.2, 9))])
def test_the_preset_writer_has_the_settings_that_were_measured_for_these_sizes(kb, expected):
    assert tuple(story_llm.writer_settings(kb * 1000).values()) == expected


def test_the_command_line_takes_the_settings_of_the_size_unless_others_are_given(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 2, encoding="utf-8")
    for given, drop_rate in (([], 0.3), (["--drop-rate", "0.05"], 0.05)):
        args = story_llm.parse(["train", "--preset", "writer", "--text", str(text), *given])
        run, corpus = story_llm.new_run_from_args(args)
        assert run.config.drop_rate == drop_rate and run.train_config.epochs == 6
        assert corpus.tokenizer.kind == "story" and run.config.vocab_size <= 1024
