"""Loading weights: names, enlarged embeddings, files that do not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_utils import build_model, load, to_batch
from safetensors.torch import save_file
from torch import Tensor

from villa.errors import CheckpointError
from villa.models.base import DataFacts
from villa.models.conversion import load_weights
from villa.models.text_classifier import TextClassifier, TextClassifierConfig
from villa.models.uniter import Uniter
from villa.models.uniter_config import UniterConfig

Build = Callable[..., Uniter]
Weights = dict[str, Tensor]


@pytest.fixture
def released() -> Weights:
    weights: Weights = load("villa_vqa", "model")["state_dict"]
    return weights


@pytest.fixture
def fresh() -> Callable[..., Uniter]:
    """A fresh model of the golden files' size."""

    def build(vocab_size: int = 500, **options: object) -> Uniter:
        torch.manual_seed(5)
        config = UniterConfig(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, max_positions=128)
        for name, value in options.items():
            setattr(config, name, value)
        labels = 40 if config.head == "classification" else 2
        return Uniter.from_config(config, DataFacts(vocab_size, labels, 32))

    return build


def test_a_released_file_gives_the_released_logits(tmp_path: Path, released: Weights, fresh: Build) -> None:
    torch.save(released, tmp_path / "villa.pt")
    model = fresh().eval()
    report = load_weights(model, tmp_path / "villa.pt")
    assert (set(report.loaded), report.missing, report.unexpected) == (set(released), (), ())
    assert str(report) == f"{tmp_path / 'villa.pt'}: 56 of 56 tensors loaded"
    golden = load("villa_vqa", "batch_forward")
    torch.testing.assert_close(model(to_batch(golden["batch"], "vqa")).logits, golden["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["bert.", "module.uniter.", "module.bert.", ""])
def test_prefixes_of_other_programs_are_understood(
    tmp_path: Path, released: Weights, fresh: Build, prefix: str
) -> None:
    outer = "module." if prefix.startswith("module.") else ""
    body = {name for name in released if name.startswith("uniter.")}
    weights = {prefix + name.removeprefix("uniter."): released[name] for name in body}
    if prefix:
        weights |= {outer + name: value for name, value in released.items() if name not in body}
    torch.save({"state_dict": weights}, tmp_path / "file.pt")
    model = fresh()
    report = load_weights(model, tmp_path / "file.pt")
    assert report.unexpected == ()
    assert all(name.startswith("vqa_output") for name in report.missing)
    assert bool(report.missing) == (prefix == "")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], released[name]) for name in body)


def test_gamma_and_beta_are_weight_and_bias(tmp_path: Path, released: Weights, fresh: Build) -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in released.items()
    }
    assert old.keys() != released.keys()
    save_file(old, tmp_path / "old.safetensors")
    report = load_weights(fresh(), tmp_path / "old.safetensors")
    assert (report.missing, report.unexpected) == ((), ())


def test_a_checkpoint_folder_is_accepted(tmp_path: Path, released: Weights, fresh: Build) -> None:
    save_file(released, tmp_path / "model.safetensors")
    model = fresh()
    load_weights(model, tmp_path)
    assert all(torch.equal(value, released[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("head", "sources"), [("nlvr2_paired_attn", (0, 1, 1)), ("multiple_choice", (0, 1, 0, 0))])
def test_type_embeddings_grow_as_in_the_release(
    tmp_path: Path, released: Weights, fresh: Build, head: str, sources: tuple[int, ...]
) -> None:
    torch.save(released, tmp_path / "villa.pt")
    model = fresh(head=head)
    report = load_weights(model, tmp_path / "villa.pt")
    types = "uniter.embeddings.token_type_embeddings.weight"
    rows = ", ".join(map(str, sources))
    assert report.enlarged == (f"{types} from 2 rows to {len(sources)}, copies of rows {rows}",)
    assert torch.equal(model.state_dict()[types], released[types][list(sources)])
    assert all(not name.startswith("uniter.") for name in report.missing)
    assert report.notes()[1:] == [f"enlarged: {report.enlarged[0]}", "not used: vqa_output (6)"]


def test_new_words_stay_fresh(tmp_path: Path, released: Weights, fresh: Build) -> None:
    torch.save(released, tmp_path / "villa.pt")
    model, words = fresh(vocab_size=581), "uniter.embeddings.word_embeddings.weight"
    before = model.state_dict()[words].clone()
    assert load_weights(model, tmp_path / "villa.pt").enlarged == (f"{words} from 500 rows to 581, the last 81 fresh",)
    after = model.state_dict()[words]
    assert torch.equal(after[:500], released[words])
    assert torch.equal(after[500:], before[500:])


def test_bert_of_transformers_starts_the_text_side(tmp_path: Path, fresh: Build) -> None:
    bert = load("freelb_bert", "model_batch")["state_dict"]
    torch.save(bert, tmp_path / "pytorch_model.bin")
    model = fresh()
    report = load_weights(model, tmp_path)
    assert {name.split(".")[1] for name in report.missing if name.startswith("uniter.")} == {"img_embeddings"}
    assert report.unexpected == ("classifier.weight", "classifier.bias")
    for name in ("encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight", "pooler.dense.bias"):
        assert torch.equal(model.state_dict()[f"uniter.{name}"], bert[f"bert.{name}"])


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_bert_of_transformers_starts_a_text_classifier(tmp_path: Path, prefix: str) -> None:
    file = load("freelb_bert", "model_batch")
    options = {key: file["config"][key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    options |= {"intermediate_size": 128, "max_position_embeddings": 128}
    model = TextClassifier.from_config(TextClassifierConfig(options=options), DataFacts(500, 3))
    weights = {name.replace("bert.", prefix): value for name, value in file["state_dict"].items()}
    if not prefix:
        weights = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    torch.save(weights, tmp_path / "bert.pt")
    report = load_weights(model, tmp_path / "bert.pt")
    assert report.unexpected == ()
    assert all("classifier" in name for name in report.missing)
    assert bool(report.missing) == (not prefix)


def unchanged_after_error(model: Uniter, path: Path, message: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_missing_layers_are_an_error(tmp_path: Path, released: Weights, fresh: Build) -> None:
    torch.save(released, tmp_path / "villa.pt")
    unchanged_after_error(fresh(num_layers=3), tmp_path / "villa.pt", r"lacks uniter\.encoder\.layer\.2 \(16\)")


def test_a_file_of_something_else_is_an_error(tmp_path: Path, fresh: Build) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pt")
    unchanged_after_error(fresh(), tmp_path / "resnet.pt", r"has conv1 \(1\) instead")


def test_other_shapes_are_an_error_that_names_both(tmp_path: Path, released: Weights, fresh: Build) -> None:
    released["vqa_output.3.weight"] = torch.zeros(7, 128)
    torch.save(released, tmp_path / "villa.pt")
    message = r"vqa_output\.3\.weight has shape \[7, 128\] in the file and \[40, 128\] in the model"
    unchanged_after_error(fresh(), tmp_path / "villa.pt", message)


def test_a_smaller_vocabulary_is_an_error(tmp_path: Path, released: Weights, fresh: Build) -> None:
    torch.save(released, tmp_path / "villa.pt")
    unchanged_after_error(
        fresh(vocab_size=100), tmp_path / "villa.pt", r"word_embeddings\.weight has shape \[500, 64\]"
    )


def test_every_golden_model_loads_by_its_names(tmp_path: Path) -> None:
    for task in ("vqa", "nlvr2", "vcr"):
        file = load(f"villa_{task}", "model")
        model = build_model(file, task)  # type: ignore[arg-type]
        assert set(model.state_dict()) == set(file["state_dict"])
