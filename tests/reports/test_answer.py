from __future__ import annotations

from tpme.bench.record import Flag, LearningRates
from tpme.reports.data.answer import answer
from tpme.reports.report import make_report


def answers(factory, **options):
    [section] = make_report([factory.root], **options).sections
    return answer(section)


def test_the_best_the_cheapest_and_how_far_to_trust_it(factory):
    for seed in (1, 2):
        for method, time, skill in (("fft", 20.0, 0.6), ("iisan", 2.0, 0.59), ("lora", 15.0, 0.61), ("id", 1.0, 0.1)):
            factory.write(method, time=time * (1 + 0.001 * seed), peak=1e9 * time, skill=skill, seed=seed)
    said = answers(factory)
    assert said.best.startswith("Best Recall@10: ")
    assert "not told apart from it by the paired test over users: " in said.best
    assert "id" not in said.best.replace("paired", "")
    assert said.cheapest == (
        "Cheapest at that quality: iisan, with 2.00 s an epoch (6.01 s in all up to the best one), 1.00 M trainable "
        "parameters, 2.00 GB while training, 2.00 GB at the peak of the whole run (train); 13 % of fft's cost "
        "(weighted geometric mean of epoch time, parameters and training memory)."
    )
    assert said.trust == (
        "2 seeds a row; no cell is flagged for sharing its device; two runs of one cell differ by up to 0.2 % in time "
        "and 0 % in memory in 95 % of cases (spread over seeds)."
    )


def test_a_better_and_dearer_row_stands_alone(factory):
    factory.write("fft", time=20.0, skill=0.9)
    factory.write("lora", time=2.0, skill=0.2)
    said = answers(factory)
    assert said.best.endswith("better than every other row by the paired test over users.")
    assert "Best Recall@10: fft (" in said.best
    assert said.cheapest.startswith("Cheapest at that quality: fft, with 20.0 s an epoch")


def test_rows_tied_within_noise_are_named_together(factory):
    for seed, share in enumerate((0.9, 1.1)):
        for method, time in (("fft", 20.0), ("lora", 2.0), ("bitfit", 2.1)):
            factory.write(method, time=time * share, seed=seed, skill=0.5)
    assert "lora (tied within noise: bitfit), with" in answers(factory).cheapest


def test_random_weights_buy_no_quality(factory):
    flag = Flag(code="random-weights", message="text encoder with random weights: quality is meaningless")
    factory.write("fft", time=20.0, flags=(flag,))
    factory.write("lora", time=2.0, flags=(flag,))
    said = answers(factory)
    assert said.best == "No quality to compare: the encoders have random weights."
    assert said.cheapest.startswith("Cheapest: lora, with 2.00 s an epoch")
    assert "with random weights costs are real and quality is meaningless" in said.trust


def test_shared_devices_and_failures_are_counted(factory):
    crowded = Flag(code="crowded", message="its threads waited for a core for 17% of the training time")
    factory.write("fft", flags=(crowded,))
    factory.write("lora")
    factory.write("dyt", status="oom", time=None)
    trust = answers(factory).trust
    assert "other programs competed for the device in 1 of 2 cells" in trust
    assert "1 of 3 cells did not finish" in trust
    assert "One seed a row" in trust


def test_a_failed_cell_that_shared_its_device_is_not_among_the_finished(factory):
    crowded = Flag(code="crowded", message="its threads waited for a core for 17% of the training time")
    factory.write("lora", flags=(crowded,))
    factory.write("fft", status="diverged", flags=(crowded,))
    factory.write("dyt", status="oom", time=None, flags=(crowded,))
    assert "other programs competed for the device in 1 of 1 cells" in answers(factory).trust


def test_a_row_without_tpme_may_cost_less_and_the_sentence_does_not_deny_it(factory):
    """A reference row of the same quality has no TPME, whatever it costs."""
    factory.write("frozen", time=1.0, peak=1e8, skill=0.5)
    factory.write("lora", time=10.0, skill=0.49)
    factory.write("fft", time=20.0, skill=0.1)
    said = answers(factory)
    assert "frozen" in said.best
    assert said.cheapest.startswith("Cheapest at that quality, of the rows with a TPME: lora, with 10.0 s an epoch")


def test_equal_rows_are_no_tie_within_noise_where_none_was_measured(factory):
    for method, time in (("fft", 20.0), ("lora", 2.0), ("bitfit", 2.0)):
        factory.write(method, time=time, skill=0.5)
    said = answers(factory)
    assert "bitfit (at the same cost: lora), with" in said.cheapest
    assert "so no tie is claimed" in said.trust


def test_learning_rates_that_lost_do_not_count(factory):
    """Of two trials the flag of the one that was not selected says nothing of the row."""
    flag = Flag(code="crowded", message="its threads waited")
    factory.write("lora", skill=0.9, lr=LearningRates(method=1e-3))
    factory.write("lora", skill=0.1, lr=LearningRates(method=1e-4), lr_trial=1, flags=(flag,))
    factory.write("fft")
    assert "no cell is flagged" in answers(factory).trust


def test_nothing_finished(factory):
    factory.write("fft", status="oom", time=None)
    said = answers(factory)
    assert said.best == "No quality to compare: no row finished with ranks."
    assert said.cheapest == "No row can be called the cheapest: none has a TPME."


def test_how_the_instruments_worked_is_no_footnote_of_a_row(factory):
    """It takes nothing from a number; said of nine rows in ten it would hide what does."""
    slow = [
        Flag(code="sampler", message=f"sampled every {pause} ms at times instead of 20 ms") for pause in (25, 30, 35)
    ]
    for method, flag in zip(("fft", "lora", "adapter"), slow, strict=True):
        factory.write(method, flags=(flag,))
    factory.write("id")
    [section] = make_report([factory.root]).sections
    assert set(section.notes.marks.values()) == {()}
    assert section.notes.shared == ("Sampled every 25 to 35 ms at times instead of 20 ms (3 of 4 rows)",)
