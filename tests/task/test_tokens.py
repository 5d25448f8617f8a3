"""Tokenised titles: agreement with the reference on real input, the store, and what happens without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from tpme.bench.errors import UserError
from tpme.bench.task import tokens
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.iisan import read_iisan
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.tokens import TokenTable, tokenise

TITLES = ["a b c d e f", "a b", "c unheard"]


def make_dataset(folder: Path, titles: list[str] | None) -> Dataset:
    pictures = [lambda size: np.zeros((3, size, size), np.uint8)] * 3 if titles is None else None
    raw = RawData("toy", ["x", "y", "z"], titles, pictures, ["u"], [np.array([0, 1, 2, 0, 1], np.int32)], {})
    prepare(raw, folder, image_size=2)
    return Dataset.open(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data", TITLES)


def make_tokenizer(folder: Path, *, pad_token: str | None = "[PAD]", padding_side: str = "right") -> str:
    """A word tokenizer: [CLS] 1 ... [SEP] 2, [UNK] 3, [PAD] 9, a 4, b 5 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["never", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d", "e", "[PAD]", "f"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token=pad_token, padding_side=padding_side
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return str(folder)


@pytest.mark.parametrize(("pad_token", "padding"), [("[PAD]", 9), (None, 0)])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_titles_are_cut_and_filled_on_the_right(
    dataset: Dataset, tmp_path: Path, pad_token: str | None, padding: int, padding_side: str
) -> None:
    source = make_tokenizer(tmp_path / "tokenizer", pad_token=pad_token, padding_side=padding_side)
    table = tokenise(dataset, source, None, 5, tmp_path / "store")
    assert table.ids.dtype == table.lengths.dtype == np.int32
    np.testing.assert_array_equal(
        table.ids, [[0, 0, 0, 0, 0], [1, 4, 5, 6, 2], [1, 4, 5, 2, padding], [1, 6, 3, 2, padding]]
    )
    np.testing.assert_array_equal(table.lengths, [0, 5, 4, 4])


def test_golden_text_matrix(shared: Callable[..., Path], tmp_path: Path) -> None:
    prepare(read_iisan(shared("data", "amazon-scientific")), tmp_path / "data")
    bert = str(shared("pretrained", "bert-base-uncased"))
    table = tokenise(Dataset.open(tmp_path / "data"), bert, None, 30, tmp_path / "store")
    mask = (np.arange(30) < table.lengths[:, None]).astype(np.int32)
    with np.load(shared("golden", "dataset_scientific.npz")) as arrays:
        np.testing.assert_array_equal(np.column_stack([table.ids, mask]), arrays["text_matrix"])
    # Reference facts, section 2: 9,540 of 20,314 titles fill all 30 tokens.
    assert int((table.lengths == 30).sum()) == 9540


def test_a_second_call_reads_the_store(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tokenizer(tmp_path / "tokenizer")
    first = tokenise(dataset, source, None, 5, tmp_path / "store")

    def refuse(*args: object) -> TokenTable:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "_tokenise", refuse)
    second = tokenise(dataset, source, None, 5, tmp_path / "store")
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.lengths, second.lengths)


def test_the_store_is_keyed_by_titles_tokenizer_and_length(dataset: Dataset, tmp_path: Path) -> None:
    source, store = make_tokenizer(tmp_path / "tokenizer"), tmp_path / "store"
    tokenise(dataset, source, None, 5, store)
    tokenise(dataset, make_tokenizer(tmp_path / "same content, other place"), None, 5, store)
    assert len(list(store.iterdir())) == 1
    assert tokenise(dataset, source, None, 4, store).ids.shape == (4, 4)
    assert len(list(store.iterdir())) == 2
    others = make_dataset(tmp_path / "others", ["f", "f", "f"])
    assert tokenise(others, source, None, 5, store).ids[1].tolist() == [1, 10, 2, 9, 9]
    assert len(list(store.iterdir())) == 3
    unpadded = make_tokenizer(tmp_path / "unpadded", pad_token=None)
    assert tokenise(dataset, unpadded, None, 5, store).ids[2].tolist() == [1, 4, 5, 2, 0]
    assert len(list(store.iterdir())) == 4


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_a_damaged_table_is_made_again(dataset: Dataset, tmp_path: Path, keep: float) -> None:
    source, store = make_tokenizer(tmp_path / "tokenizer"), tmp_path / "store"
    first = tokenise(dataset, source, None, 5, store)
    (path,) = store.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    np.testing.assert_array_equal(tokenise(dataset, source, None, 5, store).ids, first.ids)
    assert path.stat().st_size == len(whole)


def test_no_room_beside_the_special_tokens_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="title_tokens is 2"):
        tokenise(dataset, make_tokenizer(tmp_path / "tokenizer"), None, 2, tmp_path / "store")


def test_more_tokens_than_the_encoder_reads_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    source = make_tokenizer(tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 5}))
    assert tokenise(dataset, source, None, 5, tmp_path / "store").ids.shape[1] == 5
    with pytest.raises(UserError, match=r"title_tokens is 6, but '.*' reads at most 5"):
        tokenise(dataset, source, None, 6, tmp_path / "store")


def test_a_dataset_without_titles_is_refused(tmp_path: Path) -> None:
    images = make_dataset(tmp_path / "images", None)
    with pytest.raises(UserError, match="prepared without titles"):
        tokenise(images, "anything", None, 5, tmp_path / "store")


def test_a_folder_without_a_tokenizer_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"empty.*vocabulary is empty") as error:
        tokenise(dataset, str(folder), None, 5, tmp_path / "store")
    assert "\n" not in str(error.value)


@pytest.fixture
def failing_hub() -> Iterator[tuple[str, list[str]]]:
    """Address of a hub that answers 503 to everything, and the requests it got."""
    requests: list[str] = []

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(503)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Failing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_without_hub_and_cache_there_is_one_line_and_no_retry(
    failing_hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, requests = failing_hub
    program = (
        "from tpme.bench.errors import UserError\n"
        "from tpme.bench.task.tokens import load_tokenizer\n"
        "try: load_tokenizer('nobody/nothing', None)\n"
        "except UserError as error: print(error)\n"
    )
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    environment = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.startswith("tokenizer 'nobody/nothing': no such folder, its tokenizer_config.json is not in")
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "Retrying" not in done.stderr
    assert len([path for path in requests if "nothing" in path]) == 1
