"""Values of the released configurations (files of ``config/`` in ChenRocks/UNITER@1dbfa62 and zhegan27/VILLA@1d5bc2b).

Options that several files share are written once. Paths are shortened to their last part.
"""

from typing import Any

Options = dict[str, Any]

SIZES: dict[str, Options] = {
    size: {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
    }
    for size, width, layers, heads in (("base", 768, 12, 12), ("large", 1024, 24, 16))
}

_COMMON: Options = {
    "conf_th": 0.2,
    "max_bb": 100,
    "min_bb": 10,
    "num_bb": 36,
    "optim": "adamw",
    "betas": [0.9, 0.98],
    "weight_decay": 0.01,
    "dropout": 0.1,
    "grad_norm": 2.0,
    "seed": 42,
    "fp16": True,
    "n_workers": 4,
    "max_txt_len": 60,
}


def _data(**splits: tuple[str, str]) -> Options:
    """``train=("a.db b.db", "images images")``: text and image databases of a split, separated by blanks."""
    return {
        f"{split}_{kind}_dbs": names.split()
        for split, pair in splits.items()
        for kind, names in zip(("txt", "img"), pair, strict=True)
    }


_VQA = _COMMON | {"lr_mul": 10.0, "valid_steps": 500}
_VQA |= _data(
    train=("vqa_train.db vqa_trainval.db vqa_vg.db", "coco_train2014 coco_val2014 vg"),
    val=("vqa_devval.db", "coco_val2014"),
)
_VQA_BASE = _VQA | {"train_batch_size": 5120, "gradient_accumulation_steps": 5, "learning_rate": 8e-5}
_VQA_BASE |= {"num_train_steps": 6000, "warmup_steps": 600}
_VQA_LARGE = _VQA | {"train_batch_size": 3072, "gradient_accumulation_steps": 4, "learning_rate": 5e-5}
_VQA_LARGE |= {"num_train_steps": 5000, "warmup_steps": 500}

_VCR = _COMMON | {"max_txt_len": 220, "lr_mul": 1.0, "learning_rate": 6e-5, "valid_steps": 1000, "val_batch_size": 10}
_VCR |= {"num_train_steps": 8000, "warmup_steps": 800, "train_batch_size": 4000, "gradient_accumulation_steps": 5}
_VCR |= _data(train=("vcr_train.db", "vcr_gt_train;vcr_train"), val=("vcr_val.db", "vcr_gt_val;vcr_val"))

_NLVR2 = _COMMON | {"model": "paired-attn", "use_img_type": True, "valid_steps": 500}
_NLVR2 |= _data(
    train=("nlvr2_train.db", "nlvr2_train"), val=("nlvr2_dev.db", "nlvr2_dev"), test=("nlvr2_test1.db", "nlvr2_test")
)
_NLVR2_BASE = _NLVR2 | {"train_batch_size": 10240, "gradient_accumulation_steps": 1, "learning_rate": 3e-5}
_NLVR2_BASE |= {"num_train_steps": 8000, "warmup_steps": 800, "seed": 77}
_NLVR2_LARGE = _NLVR2 | {"train_batch_size": 5120, "gradient_accumulation_steps": 2, "learning_rate": 2e-5}
_NLVR2_LARGE |= {"num_train_steps": 5000, "warmup_steps": 500, "seed": 24}

_VE = _COMMON | {"train_batch_size": 4096, "num_train_steps": 4000, "warmup_steps": 400, "valid_steps": 500}
_VE |= _data(train=("ve_train.db", "flickr30k"), val=("ve_dev.db", "flickr30k"), test=("ve_test.db", "flickr30k"))
_VE_BASE = _VE | {"gradient_accumulation_steps": 4, "learning_rate": 8e-5}
_VE_LARGE = _VE | {"gradient_accumulation_steps": 2, "learning_rate": 3e-5}

_FLICKR = _COMMON | {"margin": 0.2, "learning_rate": 5e-5}
_FLICKR |= _data(
    train=("itm_flickr30k_train.db", "flickr30k"),
    val=("itm_flickr30k_val.db", "flickr30k"),
    test=("itm_flickr30k_test.db", "flickr30k"),
)
_COCO = _FLICKR | _data(
    train=("itm_coco_train.db itm_coco_restval.db", "coco_train2014 coco_val2014"),
    val=("itm_coco_val.db", "coco_val2014"),
    test=("itm_coco_test.db", "coco_val2014"),
)
_RANDOM: Options = {"train_batch_size": 40, "gradient_accumulation_steps": 4, "negative_size": 1}
_RANDOM |= {"inf_minibatch_size": 40, "num_train_steps": 20000, "warmup_steps": 2000, "valid_steps": 2000}
_HARD: Options = {"train_batch_size": 8, "negative_size": 399, "hard_neg_size": 31, "inf_minibatch_size": 400}
_HARD |= {"num_train_steps": 5000, "warmup_steps": 500, "valid_steps": 500}


def _referring(name: str, **options: Any) -> Options:
    data = _data(train=(f"{name}_train.db", "re_coco_gt"), val=(f"{name}_val.db", "re_coco_det"))
    common = _COMMON | {"conf_th": -1, "num_bb": 100, "train_batch_size": 128, "gradient_accumulation_steps": 1}
    return common | {"seed": 24, "lr_mul": 1.0, "checkpoint": "uniter-base.pt"} | data | options


def _adversarial(modality: str, step_size: float, kl_weight: float) -> Options:
    adversarial = {"adv_training": True, "adv_modality": modality.split(), "adv_lr_txt": step_size}
    adversarial |= {"adv_lr_img": step_size, "adv_steps": 3, "norm_type": "l2", "adv_max_norm": 0}
    return adversarial | {"adv_kl_weight": kl_weight}


_BEST = _VQA_LARGE | {"train_batch_size": 2048, "gradient_accumulation_steps": 3, "conf_th": 0.075}
_BEST |= {"compressed_db": True, "num_train_steps": 7000, "warmup_steps": 700}
_VCR_LARGE = _VCR | {"train_batch_size": 2000, "gradient_accumulation_steps": 10, "seed": 88}
_VCR_LARGE |= {"num_train_steps": 10000, "warmup_steps": 1000}
_TEXT = _adversarial("text", 1e-3, 1.5)

#: Recipe below ``projects`` to task, size, number of GPUs, checkpoint and options of the released configuration.
CONFIGS: dict[str, tuple[str, str, int, str, Options]] = {
    "uniter/vqa": ("vqa", "base", 4, "uniter-base", _VQA_BASE),
    "uniter/vqa_large": ("vqa", "large", 8, "uniter-large", _VQA_LARGE),
    "uniter/vcr": ("vcr", "base", 4, "uniter-base-vcr_2nd_stage", _VCR),
    "uniter/vcr_large": ("vcr", "large", 4, "uniter-large-vcr_2nd_stage", _VCR),
    "uniter/nlvr2": ("nlvr2", "base", 1, "uniter-base", _NLVR2_BASE),
    "uniter/nlvr2_large": ("nlvr2", "large", 2, "uniter-large", _NLVR2_LARGE),
    "uniter/snli_ve": ("ve", "base", 2, "uniter-base", _VE_BASE),
    "uniter/snli_ve_large": ("ve", "large", 4, "uniter-large", _VE_LARGE),
    "uniter/itm_flickr": ("itm", "base", 8, "uniter-base", _FLICKR | _RANDOM),
    "uniter/itm_flickr_hard": ("itm", "base", 16, "uniter-base", _FLICKR | _HARD),
    # The released file names uniter-base.pt, which does not fit uniter-large.json.
    "uniter/itm_flickr_hard_large": ("itm", "large", 16, "uniter-large", _FLICKR | _HARD),
    "uniter/itm_coco_hard": ("itm", "base", 16, "uniter-base", _COCO | _HARD),
    "uniter/itm_coco_hard_large": ("itm", "large", 16, "uniter-large", _COCO | _HARD | {"learning_rate": 3e-5}),
    "uniter/refcoco": (
        "re",
        "base",
        1,
        "uniter-base",
        _referring("refcoco", learning_rate=1e-4, num_train_steps=24000, warmup_steps=1500),
    ),
    "uniter/refcoco_plus": (
        "re",
        "base",
        1,
        "uniter-base",
        _referring("refcoco+", mlp=2, learning_rate=6e-5, num_train_steps=10000, warmup_steps=1000),
    ),
    "uniter/refcocog": (
        "re",
        "base",
        1,
        "uniter-base",
        _referring("refcocog", learning_rate=1e-4, num_train_steps=24000, warmup_steps=1500),
    ),
    "villa/vqa": ("vqa", "base", 4, "villa-base", _VQA_BASE | _TEXT),
    "villa/vqa_large": ("vqa", "large", 8, "villa-large", _VQA_LARGE | _adversarial("text", 2e-3, 1.0)),
    "villa/vqa_large_reproducibility": (
        "vqa",
        "large",
        16,
        "villa-large",
        _BEST | _adversarial("image text", 2e-3, 1.0),
    ),
    "villa/vcr": ("vcr", "base", 4, "villa-base-vcr-2nd-stage", _VCR | _adversarial("image text", 1e-2, 1.5)),
    "villa/vcr_large": (
        "vcr",
        "large",
        4,
        "villa-large-vcr-2nd-stage",
        _VCR_LARGE | _adversarial("image text", 1e-1, 1.0),
    ),
    "villa/nlvr2": ("nlvr2", "base", 1, "villa-base", _NLVR2_BASE | _TEXT),
    "villa/nlvr2_large": ("nlvr2", "large", 2, "villa-large", _NLVR2_LARGE | _TEXT),
    "villa/snli_ve": ("ve", "base", 2, "villa-base", _VE_BASE | _TEXT),
    "villa/snli_ve_large": ("ve", "large", 4, "villa-large", _VE_LARGE | _TEXT),
}
