"""The prepared format: what the reader derives, agreement with the reference's reading of Scientific, damage."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpme.bench.errors import UserError
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.iisan import read_iisan
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.sources.synthetic import Synthetic, generate

Golden = dict[str, Any]


class Grey:
    """A picture of one shade."""

    def __init__(self, shade: int) -> None:
        self.shade = shade

    def __call__(self, size: int) -> np.ndarray:
        return np.full((3, size, size), self.shade, np.uint8)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two users, max_seq_len 2: the first fills every window, the second has three items."""
    raw = RawData(
        name="small",
        items=["a", "unused", "b", "c", "d", "e"],
        titles=["Größe", "never", "b b", "c", "d", "\u2028e\nf"],
        pictures=[Grey(shade) for shade in (10, 0, 20, 30, 40, 50)],
        users=["u", "v"],
        histories=[np.array([0, 2, 3, 4, 5, 0], np.int32), np.array([3, 3, 4], np.int32)],
        skipped={},
    )
    folder = tmp_path_factory.mktemp("small") / "data"
    prepare(raw, folder, max_seq_len=2, min_interactions=3, image_size=4)
    return folder


def test_what_a_record_says_of_the_data(small: Path, tmp_path: Path) -> None:
    manifest = Dataset.open(small).manifest
    facts = Dataset.open(small).facts("mine")
    assert (facts.name, facts.source, facts.synthetic) == ("mine", "small", None)
    assert (facts.max_seq_len, facts.image_size, facts.modalities) == (2, 4, ("text", "image"))
    assert (facts.fingerprint, facts.users, facts.items, facts.interactions) == (manifest.fingerprint, 2, 5, 8)
    assert facts.items_never_trained == 2  # a and e
    invented = generate(Synthetic(users=10, continues=0.5)).only(("text",))
    prepare(invented, tmp_path / "invented", max_seq_len=3)
    facts = Dataset.open(tmp_path / "invented").facts("s")
    assert (facts.source, facts.synthetic) == ("synthetic", {"users": 10, "continues": 0.5})
    assert (facts.max_seq_len, facts.image_size) == (3, None)


def test_windows_of_a_hand_made_example(small: Path) -> None:
    # ids: a 1, b 2, c 3, d 4, e 5; the first user keeps its last 5 of 6 items: b c d e a
    dataset = Dataset.open(small)
    assert dataset.item_names == ["", "a", "b", "c", "d", "e"]
    assert dataset.user_names == ["u", "v"]
    np.testing.assert_array_equal(dataset.train_slots, [[2, 3, 4], [0, 0, 3]])
    np.testing.assert_array_equal(dataset.valid.inputs, [[3, 4], [0, 3]])
    np.testing.assert_array_equal(dataset.valid.target, [5, 3])
    np.testing.assert_array_equal(dataset.valid.history, [[0, 2, 3, 4], [0, 0, 0, 3]])
    np.testing.assert_array_equal(dataset.test.inputs, [[4, 5], [3, 3]])
    np.testing.assert_array_equal(dataset.test.target, [1, 4])
    np.testing.assert_array_equal(dataset.test.history, [[2, 3, 4, 5], [0, 0, 3, 3]])
    np.testing.assert_array_equal(dataset.popularity, [1, 0, 1 / 4, 2 / 4, 1 / 4, 0])
    assert dataset.items_never_trained == 2
    assert dataset.cold_test_share == 0.5
    arrays = (dataset.train_slots, dataset.valid.inputs, dataset.valid.target, dataset.test.history)
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}


def test_derived_arrays_are_built_once(small: Path) -> None:
    dataset = Dataset.open(small)
    assert dataset.test is dataset.test
    assert dataset.train_slots is dataset.train_slots


def test_titles_are_a_list_by_item_id(small: Path) -> None:
    titles = Dataset.open(small).titles
    assert titles is not None
    assert list(titles) == ["", "Größe", "b b", "c", "d", "\u2028e\nf"]
    assert titles[-1] == titles[5]
    assert titles[1:3] == ["Größe", "b b"]
    with pytest.raises(IndexError):
        titles[6]


def test_images_are_gathered_by_item_id(small: Path) -> None:
    dataset = Dataset.open(small)
    assert isinstance(dataset.images, np.memmap)
    gathered = dataset.gather_images(np.array([5, 0, 1, 5]))
    assert gathered.dtype == np.uint8
    assert gathered.shape == (4, 3, 4, 4)
    assert not isinstance(gathered, np.memmap)
    np.testing.assert_array_equal(gathered[:, 0, 0, 0], [50, 0, 10, 50])


def test_a_text_only_dataset_has_no_images(small: Path, tmp_path: Path) -> None:
    raw = RawData("t", ["a"], ["A"], None, ["u"], [np.zeros(5, np.int32)], {})
    prepare(raw, tmp_path / "text")
    dataset = Dataset.open(tmp_path / "text")
    assert dataset.manifest.modalities == ("text",)
    assert dataset.images is None
    with pytest.raises(UserError, match="without images"):
        dataset.gather_images(np.array([1]))


def test_an_image_only_dataset_has_no_titles(tmp_path: Path) -> None:
    raw = RawData("i", ["a"], None, [Grey(7)], ["u"], [np.zeros(5, np.int32)], {})
    prepare(raw, tmp_path / "image", image_size=2)
    dataset = Dataset.open(tmp_path / "image")
    assert dataset.manifest.modalities == ("image",)
    assert dataset.titles is None


# --- damage ------------------------------------------------------------------------------------------------

FILES = (
    "sequences.npy",
    "offsets.npy",
    "items.txt",
    "users.txt",
    "titles.bin",
    "title_offsets.npy",
    "images.npy",
    "dataset.json",
)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def test_the_list_of_files_is_complete(small: Path) -> None:
    assert {path.name for path in small.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_a_truncated_file_is_named(copy: Path, name: str, keep: float) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        Dataset.open(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        Dataset.open(copy)


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such data set"):
        Dataset.open(tmp_path / "nowhere")


def test_another_folder_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a prepared data set"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"items": -1}, "field 'items'"),
        ({"surprise": 1}, "field 'surprise'"),
        ({"items": 4}, "does not fit dataset.json"),
        ({"users": 3}, "does not fit dataset.json"),
        ({"image_size": 8}, "images.npy"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy: Path, change: dict[str, int], message: str) -> None:
    manifest = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=message):
        Dataset.open(copy)


# --- agreement with the reference on real input ------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(shared: Callable[..., Path]) -> Golden:
    loaded: Golden = json.loads(shared("golden", "dataset_scientific.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def scientific(shared: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """As the command prepares it, with its defaults."""
    folder = tmp_path_factory.mktemp("scientific") / "prepared"
    command = ["tpme.bench.cli", "prepare", "iisan", str(shared("data", "amazon-scientific")), str(folder)]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Dataset.open(folder)


def as_lists(padded: np.ndarray) -> list[list[int]]:
    return [row[row > 0].tolist() for row in padded]


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def test_scientific_counts(scientific: Dataset, golden: Golden) -> None:
    manifest = scientific.manifest
    assert manifest.users == golden["n_users"]
    assert manifest.items == golden["n_items"]
    assert manifest.interactions == golden["n_interactions_kept"]
    lengths = np.count_nonzero(scientific.train_slots, axis=1)
    assert {str(k): v for k, v in Counter(lengths.tolist()).items()} == golden["train_len_hist"]
    assert int(lengths.sum()) == golden["n_train_items_total"] == golden["train_total"]
    assert int((lengths - 1).sum()) == golden["n_train_positions"]
    assert scientific.items_never_trained == golden["pop_zero_items"]
    repeats = [len(set(items)) < len(items) for items in as_lists(scientific.train_slots)]
    assert sum(repeats) == golden["users_with_repeat_in_train"]


def test_scientific_raw_lengths(shared: Callable[..., Path], golden: Golden) -> None:
    raw = read_iisan(shared("data", "amazon-scientific"))
    lengths = Counter(len(history) for history in raw.histories)
    assert {str(k): v for k, v in lengths.items()} == golden["raw_len_hist"]
    assert sum(len(history) for history in raw.histories) == golden["n_interactions_raw"]
    assert len(raw.items) == golden["n_items_in_tsv"]
    assert sum(count for length, count in lengths.items() if length > 13) == golden["n_users_truncated"]


def test_scientific_splits(scientific: Dataset, golden: Golden) -> None:
    valid, test = scientific.valid, scientific.test
    expected = golden["sha256"]
    assert digest(as_lists(scientific.train_slots)) == expected["train"]
    assert digest(as_lists(np.column_stack([valid.inputs, valid.target]))) == expected["valid"]
    assert digest(as_lists(np.column_stack([test.inputs, test.target]))) == expected["test"]
    assert digest(as_lists(valid.history)) == expected["hist_valid"]
    assert digest(as_lists(test.history)) == expected["hist_test"]
    assert digest(scientific.item_names[1:]) == expected["item_names"]


def test_scientific_padding_is_on_the_left(scientific: Dataset) -> None:
    test = scientific.test
    for array in (scientific.train_slots, scientific.valid.inputs, test.inputs, test.history):
        real = array > 0
        assert np.all(real[:, 1:] >= real[:, :-1])


def test_scientific_first_users(scientific: Dataset, golden: Golden) -> None:
    names = np.array(scientific.item_names)
    valid, test = scientific.valid, scientific.test
    for expected in golden["first_users"]:
        user = scientific.user_names.index(expected["user"])
        seen = {
            "train": scientific.train_slots[user],
            "valid": np.append(valid.inputs[user], valid.target[user]),
            "test": np.append(test.inputs[user], test.target[user]),
        }
        for split, padded in seen.items():
            ids = padded[padded > 0]
            assert ids.tolist() == expected[f"{split}_ids"]
            assert names[ids].tolist() == expected[split]
        for key, history in (("history_valid", valid.history), ("history_test", test.history)):
            assert names[history[user][history[user] > 0]].tolist() == expected[key]


def test_scientific_popularity(scientific: Dataset, golden: Golden, shared: Callable[..., Path]) -> None:
    popularity = scientific.popularity
    with np.load(shared("golden", "dataset_scientific.npz")) as arrays:
        expected = arrays["pop_prob"]
    # The counts are equal; the reference's quotient for one of them (51) is not the correctly rounded one.
    np.testing.assert_array_max_ulp(popularity, expected, maxulp=1)
    np.testing.assert_array_equal(
        np.rint(popularity[1:] * golden["train_total"]), np.rint(expected[1:] * golden["train_total"])
    )
    assert popularity.dtype == np.float64
    assert int(popularity[1:].argmax()) + 1 == golden["pop_argmax"]
    assert float(popularity[1:].max()) == golden["pop_max"]
    assert popularity[1:].sum() == pytest.approx(golden["pop_prob_sum_1_to_n"], abs=1e-12)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_scientific_targets_that_cannot_hit_and_cold_ones(scientific: Dataset, golden: Golden, split: str) -> None:
    part = getattr(scientific, split)
    in_history = (part.history == part.target[:, None]).any(axis=1)
    assert int(in_history.sum()) == golden[f"{split}_target_in_history"]
    assert int((scientific.popularity[part.target] == 0).sum()) == golden[f"{split}_target_zero_train_pop"]


def test_scientific_cold_share(scientific: Dataset) -> None:
    # Reference facts, section 2: 20.23 % cold test targets.
    assert round(100 * scientific.cold_test_share, 2) == 20.23
