from __future__ import annotations

from tpme.bench.record import EncoderSpec, LearningRates, Training
from tpme.reports.data.load import load
from tpme.reports.data.trials import GROUP, OTHER_TASKS, names, shorten_path, split


def lr(rate: float) -> LearningRates:
    return LearningRates(method=rate)


def test_the_best_mean_validation_recall_is_selected_whatever_the_test_says(factory):
    # Trial 1 is better in testing (skill) and in one seed, but trial 0 has the better mean on validation.
    for trial, seed, valid, skill in ((0, 1, 0.2, 0.1), (0, 2, 0.2, 0.1), (1, 1, 0.3, 0.9), (1, 2, 0.05, 0.9)):
        factory.write(
            "lora", seed=seed, lr=lr(1e-4 * (1 + trial)), lr_trial=trial, lr_trials=2, valid_recall=valid, skill=skill
        )
    df = load([factory.root])
    assert set(df.loc[df["selected"], "lr_trial"]) == {0}
    assert df["selected"].sum() == 2
    assert set(df["search_trials"]) == {2}
    assert set(df["search_cells"]) == {4}
    assert set(df["search_wall_s"]) == {df["wall_s"].sum()}


def test_a_trial_that_finished_fewer_seeds_does_not_win_by_luck(factory):
    for seed in (1, 2):
        factory.write("lora", seed=seed, lr=lr(1e-4), lr_trial=0, lr_trials=2, valid_recall=0.2)
    factory.write("lora", seed=1, lr=lr(9e-3), lr_trial=1, lr_trials=2, valid_recall=0.9)
    factory.write("lora", seed=2, lr=lr(9e-3), lr_trial=1, lr_trials=2, status="diverged", time=None)
    df = load([factory.root])
    assert set(df.loc[df["selected"], "lr_trial"]) == {0}


def test_ties_and_total_failure_go_to_the_first_trial(factory):
    for trial in (0, 1):
        factory.write("lora", lr=lr(1e-4 * (1 + trial)), lr_trial=trial, lr_trials=2, valid_recall=0.2)
        factory.write("dyt", lr=lr(1e-4 * (1 + trial)), lr_trial=trial, lr_trials=2, status="oom", time=None)
    df = load([factory.root])
    assert set(df.loc[df["selected"], "lr_trial"]) == {0}
    assert df["selected"].sum() == 2


def test_options_and_cache_make_rows_of_their_own(factory):
    factory.write("lora", lr=lr(1e-4), lr_trial=0)
    factory.write("lora", lr=lr(2e-4), lr_trial=1, options={"rank": 4})
    factory.write("iisan", lr=lr(1e-4))
    factory.write("iisan", lr=lr(1e-4), cached=True)
    df = load([factory.root])
    assert df["selected"].all()
    (group,) = split(df)
    assert set(group.cells["row"]) == {"lora", "lora [rank=4]", "iisan", "iisan (cached)"}


def test_unusual_training_settings_show_in_the_name(factory):
    factory.write("fft")
    factory.write("lora")
    factory.write("fft", training=Training(activation_checkpointing=True))
    factory.write("iisan", training=Training(users_per_batch=64), options={"bottleneck": 16})
    (group,) = split(load([factory.root]))
    assert set(group.cells["row"]) == {"fft", "lora", "fft [activation_checkpointing]", "iisan [users_per_batch=64]"}


def test_code_versions_are_rows_of_their_own(factory):
    factory.write("fft", code="aaaaaaaaaa")
    factory.write("fft", code="bbbbbbbbbb", started_at="2026-01-02T00:00:00+00:00")
    (group,) = split(load([factory.root], history=True))
    assert set(group.cells["row"]) == {"fft [@aaaaaaa]", "fft [@bbbbbbb]"}


def test_every_method_has_a_code_version(factory):
    factory.write("fft", code="aaaaaaaaaa")
    factory.write("lora", code="bbbbbbbbbb")
    (group,) = split(load([factory.root]))
    assert set(group.cells["row"]) == {"fft", "lora"}


def test_what_is_not_comparable_is_another_group(factory, make_factory):
    make_factory(factory.root / "elsewhere").write("fft")
    factory.write("fft", protocol="paper")
    factory.write("fft", device_key="another")
    factory.write("fft", dataset_fingerprint="cd" * 32)
    factory.write("fft", training=Training(precision="bf16"))
    factory.write("fft", text_encoder=EncoderSpec(source="builtin:tiny-text", weights="random"))
    factory.write("fft", modalities=("text",), image_encoder=None)
    groups = split(load([factory.root]))
    assert len(groups) == 7
    assert all(len(group.cells) == 1 for group in groups)
    assert len(set(names(groups))) == 7


def test_a_cell_without_encoders_joins_every_group_of_the_rest(factory):
    for source in ("one", "other"):
        factory.write("fft", text_encoder=EncoderSpec(source=source))
    factory.write("popularity", text_encoder=None, image_encoder=None)
    factory.write("id", text_encoder=None, image_encoder=None, protocol="paper")
    groups = split(load([factory.root]))
    assert [sorted(group.cells["row"]) for group in groups] == [["id"], ["fft", "popularity"], ["fft", "popularity"]]
    assert all(set(group.key) == set(GROUP) - set(OTHER_TASKS) for group in groups)


def test_paths_are_cut_to_their_end():
    assert (
        shorten_path("/home/me/models/bert/text (text), org/model@main (image)")
        == "bert/text (text), org/model@main (image)"
    )
    assert shorten_path("builtin:tiny-text (text)") == "builtin:tiny-text (text)"
