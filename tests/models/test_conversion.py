"""Loading weights: names, enlarged embeddings, files that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_utils import GOLDEN, build_model, golden_config, load, to_batch
from safetensors.torch import save_file
from torch import Tensor, nn

from villa.errors import CheckpointError
from villa.facts import DataFacts
from villa.models.loading import load_weights
from villa.models.text_classifier import TextClassifier, TextClassifierConfig
from villa.models.uniter.heads import UniterForClassification
from villa.models.uniter.model import Uniter

Build = Callable[..., Uniter]
Weights = dict[str, Tensor]


@pytest.fixture
def released() -> Weights:
    weights: Weights = load("villa_vqa", "model")["state_dict"]
    return weights


@pytest.fixture
def pretrained(released: Weights) -> Weights:
    """A whole pre-training file, by the names and shapes that the release has at this size."""
    torch.manual_seed(6)
    shapes = json.loads((GOLDEN / "pretrain" / "keys.json").read_text(encoding="utf-8"))
    weights = {name: released.get(name, torch.randn(shape)) for name, shape in shapes.items()}
    weights["cls.predictions.decoder.weight"] = weights["uniter.embeddings.word_embeddings.weight"]
    weights["feat_regress.weight"] = weights["uniter.img_embeddings.img_linear.weight"]
    return weights


@pytest.fixture
def fresh() -> Callable[..., Uniter]:
    """A fresh model of the golden files' size."""

    def build(vocab_size: int = 500, head: str = "classification", **options: object) -> Uniter:
        torch.manual_seed(5)
        labels = 40 if head == "classification" else None
        return Uniter.from_config(golden_config(head, **options), DataFacts(vocab_size, labels, 32))

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model."], ids=["of DataParallel", "of torch.compile", "of Lightning"]
)
def test_names_and_numbers_of_other_trainers(
    prefix: str, dtype: torch.dtype, tmp_path: Path, released: Weights, fresh: Build
) -> None:
    kept = {"epoch": 3, "global_step": 100} if prefix == "model." else {}
    torch.save(
        {"state_dict": {prefix + name: value.to(dtype) for name, value in released.items()}, **kept},
        tmp_path / "x.ckpt",
    )
    model = fresh()
    report = load_weights(model, tmp_path / "x.ckpt")
    assert (set(report.loaded), report.missing, report.unexpected) == (set(released), (), ())
    assert all(torch.equal(value, released[name].to(dtype).float()) for name, value in model.state_dict().items())


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


@pytest.mark.parametrize("prefix", ["uniter.", "bert."])
def test_a_pretraining_file_starts_a_task(tmp_path: Path, pretrained: Weights, fresh: Build, prefix: str) -> None:
    torch.save({name.replace("uniter.", prefix): value for name, value in pretrained.items()}, tmp_path / "pre.pt")
    model = fresh(vocab_size=581, head="multiple_choice")
    report = load_weights(model, tmp_path / "pre.pt")
    words, types = (f"uniter.embeddings.{kind}_embeddings.weight" for kind in ("word", "token_type"))
    assert str(report).splitlines() == [
        f"{tmp_path / 'pre.pt'}: 50 of 56 tensors loaded",
        "  fresh: vcr_output (6)",
        f"  enlarged: {words} from 500 rows to 581, the last 81 fresh; "
        f"{types} from 2 rows to 4, copies of rows 0, 1, 0, 0",
        "  pre-training heads, not used: cls (6), feat_regress (6), region_classifier (6), itm_output (2)",
    ]
    loaded = model.state_dict()
    same = [name for name in pretrained if name in loaded and name not in (words, types)]
    assert len(same) == 48
    assert all(torch.equal(loaded[name], pretrained[name]) for name in same)


def test_the_second_stage_of_vcr_loads_as_it_is(tmp_path: Path, fresh: Build) -> None:
    weights = load("villa_vcr", "model")["state_dict"]
    weights = {name: value for name, value in weights.items() if not name.startswith("vcr_output")}
    torch.save(weights, tmp_path / "second.pt")
    model = fresh(vocab_size=581, head="multiple_choice")
    report = load_weights(model, tmp_path / "second.pt")
    assert report.notes() == ["fresh: vcr_output (6)"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_the_ranking_head_starts_from_the_matching_row(tmp_path: Path, pretrained: Weights, fresh: Build) -> None:
    torch.save(pretrained, tmp_path / "pre.pt")
    model = fresh(head="ranking")
    report = model.load_weights(str(tmp_path / "pre.pt"))
    assert report.notes()[0] == (
        "started from other tensors: rank_output.weight from row 1 of itm_output.weight; "
        "rank_output.bias from row 1 of itm_output.bias"
    )
    loaded = model.state_dict()
    for kind in ("weight", "bias"):
        assert torch.equal(loaded[f"rank_output.{kind}"], pretrained[f"itm_output.{kind}"][1:])
        assert torch.equal(loaded[f"itm_output.{kind}"], pretrained[f"itm_output.{kind}"])


def test_a_trained_ranking_head_is_kept(tmp_path: Path, pretrained: Weights, fresh: Build) -> None:
    own = {"rank_output.weight": torch.randn(1, 64), "rank_output.bias": torch.randn(1)}
    torch.save(pretrained | own, tmp_path / "ranked.pt")
    model = fresh(head="ranking")
    assert model.load_weights(str(tmp_path / "ranked.pt")).derived == ()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())


def test_without_the_matching_head_the_ranking_head_is_fresh(tmp_path: Path, released: Weights, fresh: Build) -> None:
    torch.save(released, tmp_path / "vqa.pt")
    assert fresh(head="ranking").load_weights(str(tmp_path / "vqa.pt")).notes() == [
        "fresh: itm_output (2), rank_output (2)",
        "not used: vqa_output (6)",
    ]


class WithDecoder(UniterForClassification):
    """A head with the released decoder, tied to the word embedding."""

    def add_head(self) -> None:
        super().add_head()
        predictions = nn.Module()
        predictions.decoder = nn.Linear(self.sizes.hidden_size, self.sizes.vocab_size, bias=False)
        predictions.decoder.weight = self.uniter.embeddings.word_embeddings.weight
        predictions.bias = nn.Parameter(torch.zeros(self.sizes.vocab_size))
        self.cls = nn.Module()
        self.cls.predictions = predictions


@pytest.mark.parametrize("has_decoder", [True, False])
def test_tied_weights_are_not_missing_and_grow_together(
    tmp_path: Path, released: Weights, fresh: Build, has_decoder: bool
) -> None:
    words, decoder = "uniter.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    weights = released | {"cls.predictions.bias": torch.randn(500)}
    torch.save(weights | ({decoder: released[words]} if has_decoder else {}), tmp_path / "file.pt")
    sizes = fresh(vocab_size=510).sizes
    model = WithDecoder(sizes, 40)
    report = load_weights(model, tmp_path / "file.pt")
    assert (report.missing, report.unexpected) == ((), ())
    assert str(report).splitlines()[0].endswith("58 of 58 tensors loaded")
    loaded = model.state_dict()
    assert torch.equal(loaded[decoder][:500], released[words])
    assert torch.equal(loaded["cls.predictions.bias"][:500], weights["cls.predictions.bias"])
    assert loaded[decoder].data_ptr() == loaded[words].data_ptr()


def test_bert_of_transformers_starts_the_text_side(tmp_path: Path, fresh: Build) -> None:
    bert = load("freelb_bert", "model_batch")["state_dict"]
    torch.save(bert, tmp_path / "pytorch_model.bin")
    model = fresh()
    report = load_weights(model, tmp_path)
    assert {name.split(".")[1] for name in report.missing if name.startswith("uniter.")} == {"img_embeddings"}
    assert report.notes() == [
        "text-only weights, all of the image side is fresh: uniter.img_embeddings (11)",
        "fresh: vqa_output (6)",
        "not used: classifier (2)",
    ]
    for name in ("encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight", "pooler.dense.bias"):
        assert torch.equal(model.state_dict()[f"uniter.{name}"], bert[f"bert.{name}"])


@pytest.mark.parametrize("kind", ["BertModel", "BertForPreTraining", "BertForMaskedLM"])
@pytest.mark.parametrize("safe", [True, False])
def test_what_transformers_saves_starts_the_text_side(tmp_path: Path, fresh: Build, kind: str, safe: bool) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    bert = getattr(transformers, kind)(config)
    if safe:
        bert.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()
    else:
        torch.save(bert.state_dict(), tmp_path / "pytorch_model.bin")
    model = fresh()
    report = load_weights(model, tmp_path)
    pooler = kind != "BertForMaskedLM"
    fresh_modules = ["vqa_output (6)"] if pooler else ["uniter.pooler (2)", "vqa_output (6)"]
    assert report.notes()[:2] == [
        "text-only weights, all of the image side is fresh: uniter.img_embeddings (11)",
        f"fresh: {', '.join(fresh_modules)}",
    ]
    assert all(note.startswith("pre-training heads, not used: cls") for note in report.notes()[2:])
    body = (bert if kind == "BertModel" else bert.bert).state_dict()
    taken = [name for name in body if f"uniter.{name}" in report.loaded]
    assert len(taken) == 37 + 2 * pooler
    assert all(torch.equal(model.state_dict()[f"uniter.{name}"], body[name]) for name in taken)


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


@pytest.mark.parametrize(
    "name",
    ["embeddings.position_embeddings.weight", "embeddings.LayerNorm.bias", "img_embeddings.pos_linear.weight"],
)
def test_a_missing_tensor_of_the_backbone_is_an_error_that_names_it(
    tmp_path: Path, released: Weights, fresh: Build, name: str
) -> None:
    del released[f"uniter.{name}"]
    torch.save(released, tmp_path / "villa.pt")
    unchanged_after_error(fresh(), tmp_path / "villa.pt", rf"lacks uniter\.{name}; check")


def test_two_names_for_one_tensor_are_an_error(tmp_path: Path, released: Weights, fresh: Build) -> None:
    released["uniter.embeddings.LayerNorm.gamma"] = torch.zeros(64)
    torch.save(released, tmp_path / "villa.pt")
    unchanged_after_error(fresh(), tmp_path / "villa.pt", r"two tensors .* are 'uniter\.embeddings\.LayerNorm\.weight'")


class Convolutions(nn.Sequential):
    """A model whose names say nothing."""

    def __init__(self) -> None:
        super().__init__(*(nn.Conv1d(1, 1, 1) for _ in range(3)))


@pytest.mark.parametrize(("kept", "fits"), [(4, True), (2, False)])
def test_a_model_of_unknown_build_needs_half_of_its_tensors(tmp_path: Path, kept: int, fits: bool) -> None:
    weights = dict(list(Convolutions().state_dict().items())[:kept])
    torch.save(weights, tmp_path / "part.pt")
    model = Convolutions()
    if fits:
        assert load_weights(model, tmp_path / "part.pt").notes() == ["fresh: 2 (2)"]
        assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    else:
        with pytest.raises(CheckpointError, match=r"lacks 1 \(2\), 2 \(2\); check"):
            load_weights(model, tmp_path / "part.pt")


def test_a_file_of_something_else_is_an_error(tmp_path: Path, fresh: Build) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pt")
    unchanged_after_error(fresh(), tmp_path / "resnet.pt", r"lacks uniter \(37\) and has conv1\.weight instead")


def test_other_shapes_are_an_error_that_names_both(tmp_path: Path, released: Weights, fresh: Build) -> None:
    released["vqa_output.3.weight"] = torch.zeros(7, 128)
    torch.save(released, tmp_path / "villa.pt")
    message = r"vqa_output\.3\.weight has shape \[7, 128\] in the file and \[40, 128\] in the model"
    unchanged_after_error(fresh(), tmp_path / "villa.pt", message)


def test_all_other_shapes_are_named(tmp_path: Path, released: Weights, fresh: Build) -> None:
    torch.save(released, tmp_path / "villa.pt")
    with pytest.raises(CheckpointError) as caught:
        load_weights(fresh(intermediate_size=256), tmp_path / "villa.pt")
    assert str(caught.value).count("has shape") == 4
    assert " and 2 more; build the model" in str(caught.value)


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


def test_numbers_that_are_not_finite_are_refused(fresh: Build, tmp_path: Path) -> None:
    model = fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in (float("nan"), float("inf")):
        weights = {name: tensor.clone() for name, tensor in before.items()}
        weights["uniter.pooler.dense.bias"][3] = value
        torch.save(weights, tmp_path / "file.pt")
        with pytest.raises(CheckpointError, match=r"NaN or infinite numbers in 'uniter\.pooler\.dense\.bias'"):
            load_weights(model, tmp_path / "file.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
