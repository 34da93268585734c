"""Export in the released layouts: it reads back to the same bits, whatever it was made of."""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from golden_utils import GOLDEN, build_model, load
from torch import Tensor

from villa.checkpoints.store import CheckpointStore
from villa.checkpoints.weight_files import read_weights
from villa.convert.checkpoints import Layout, export_checkpoint, released_layout
from villa.errors import CheckpointError
from villa.facts import DataFacts
from villa.models.loading import load_weights
from villa.models.lxmert import Lxmert, LxmertConfig
from villa.models.uniter.model import Uniter

Build = Callable[..., Uniter]
WORDS, DECODER = "uniter.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"


def equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "vcr"])
@pytest.mark.parametrize("layout", ["uniter", "villa"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip_of_released_weights(tmp_path: Path, task: str, layout: Layout, suffix: str) -> None:
    released = load(f"villa_{task}", "model")
    weights = released["state_dict"]
    torch.save(weights, tmp_path / "released.pt")
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    export_checkpoint(tmp_path / "released.pt", first, layout=layout)
    prefix = {"uniter": "uniter.", "villa": "bert."}[layout]
    assert equal(read_weights(first), {name.replace("uniter.", prefix): value for name, value in weights.items()})

    model = build_model(released, task)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    load_weights(model, first)
    assert equal(model.state_dict(), weights)
    CheckpointStore(tmp_path / "run" / "checkpoints", keep=1).save(1, model.state_dict(), {}, config_yaml="")
    export_checkpoint(tmp_path / "run", second, layout=layout)
    assert equal(read_weights(second), read_weights(first))


def test_the_file_is_a_plain_ordered_dictionary_of_single_precision(tmp_path: Path, tiny_uniter: Build) -> None:
    weights = {name: value.half() for name, value in tiny_uniter().state_dict().items()}
    torch.save(weights, tmp_path / "half.pt")
    message = export_checkpoint(tmp_path / "half.pt", tmp_path / "out.pt")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert type(written) is OrderedDict
    assert list(written) == list(weights)
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in written.values())
    assert equal(written, {name: value.float() for name, value in weights.items()})
    assert message == (
        f"{tmp_path / 'out.pt'}: {len(weights)} tensors of {tmp_path / 'half.pt'} in the layout of uniter"
    )


@pytest.mark.parametrize("layout", ["uniter", "villa"])
def test_a_pretrained_run_has_all_the_released_names(tmp_path: Path, layout: Layout) -> None:
    shapes = json.loads((GOLDEN / "pretrain" / "keys.json").read_text(encoding="utf-8"))
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights[DECODER] = weights[WORDS]
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(7, weights, {}, config_yaml="")
    export_checkpoint(store.path(7), tmp_path / "out.pt", layout=layout)
    written = read_weights(tmp_path / "out.pt")
    prefix = {"uniter": "uniter.", "villa": "bert."}[layout]
    assert written.keys() == {name.replace("uniter.", prefix) for name in shapes}
    assert written[DECODER].data_ptr() == written[WORDS.replace("uniter.", prefix)].data_ptr()
    assert equal(released_layout(written, "uniter"), weights)


def test_the_best_checkpoint_of_a_run_is_taken_and_checked(tmp_path: Path, tiny_uniter: Build) -> None:
    weights = tiny_uniter().state_dict()
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    store.save(1, weights, {}, config_yaml="", best=True)
    store.save(2, {name: value + 1 for name, value in weights.items()}, {}, config_yaml="")
    for number, source in enumerate((tmp_path / "run", store.folder, store.path(1))):
        export_checkpoint(source, tmp_path / f"{number}.pt")
        assert equal(read_weights(tmp_path / f"{number}.pt"), weights)
    with (store.path(1) / "config.yaml").open("a") as file:
        file.write("damage")
    with pytest.raises(CheckpointError, match="is damaged"):
        export_checkpoint(tmp_path / "run", tmp_path / "damaged.pt")
    assert not (tmp_path / "damaged.pt").exists()


def test_a_bert_becomes_the_start_of_pretraining(tmp_path: Path) -> None:
    bert = load("freelb_bert", "model_batch")["state_dict"]
    torch.save(bert, tmp_path / "pytorch_model.bin")
    message = export_checkpoint(tmp_path, tmp_path / "init.pt")
    assert message.endswith("; they have no image side, as those of a text model")
    assert equal(
        read_weights(tmp_path / "init.pt"), {name.replace("bert.", "uniter."): value for name, value in bert.items()}
    )


@pytest.mark.parametrize("prefix", ["roberta.", "transformer.bert.", "lxrt_encoder.model.bert."])
def test_other_models_have_no_released_layout(tiny_uniter: Build, prefix: str) -> None:
    weights = {name.replace("uniter.", prefix): value for name, value in tiny_uniter().state_dict().items()}
    with pytest.raises(CheckpointError, match="these weights are not of one UNITER") as caught:
        released_layout(weights, "uniter")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["bert.", "module.bert.", ""])
def test_lxmert_under_the_names_of_its_release_is_refused(prefix: str) -> None:
    config = LxmertConfig(hidden_size=8, language_layers=1, vision_layers=1, cross_layers=1, num_heads=2)
    model = Lxmert.from_config(config, DataFacts(vocab_size=9, num_labels=2, feature_dim=3))
    weights = {f"{prefix}{name}": value for name, value in model.lxmert.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"not of a UNITER, which has no '.*encoder\.\w+\..*'; only mod"
    ) as caught:
        released_layout(weights, "uniter")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["visual_projection.weight", "visual_token_type_embeddings.weight"])
def test_visual_bert_is_refused(tiny_uniter: Build, name: str) -> None:
    weights = tiny_uniter().state_dict() | {f"uniter.embeddings.{name}": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=f"which has no 'uniter.embeddings.{name}'"):
        released_layout(weights, "uniter")


def test_two_models_in_one_file_are_refused(tiny_uniter: Build) -> None:
    weights = tiny_uniter().state_dict()
    both = {**weights, **released_layout(weights, "villa")}
    with pytest.raises(CheckpointError, match="these weights are not of one UNITER"):
        released_layout(both, "uniter")


def test_a_tensor_larger_than_memory_is_refused(tmp_path: Path, tiny_uniter: Build) -> None:
    torch.save(tiny_uniter().state_dict() | {"huge": torch.zeros(1).expand(10**9, 10**9)}, tmp_path / "huge.pt")
    with pytest.raises(CheckpointError, match="does not fit into memory"):
        export_checkpoint(tmp_path / "huge.pt", tmp_path / "out.pt")


def test_an_export_may_replace_its_source(tmp_path: Path, tiny_uniter: Build) -> None:
    weights = tiny_uniter().state_dict()
    file = tmp_path / "weights.safetensors"
    torch.save(weights, tmp_path / "weights.pt")
    export_checkpoint(tmp_path / "weights.pt", file)
    export_checkpoint(file, file, layout="villa", force=True)
    assert equal(released_layout(read_weights(file), "uniter"), weights)
