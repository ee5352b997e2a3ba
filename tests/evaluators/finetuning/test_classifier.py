import math

import pytest
import torch
from scipy import stats
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.errors import UserError
from prelude.evaluators.finetuning.classifier import Classifier
from prelude.evaluators.finetuning.finetune import encoder_config
from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.evaluators.finetuning.targets import class_targets
from prelude.evaluators.finetuning.testing import Found
from prelude.evaluators.results import Percent
from prelude.pretrain.config import Config, EncoderConfig
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.host_waits import counting_waits
from prelude.pretrain.optimizers import apply_schedule, build_optimizer
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

CLASSES = torch.tensor([2, 3, 7, 11])
VIT = EncoderConfig(
    name="vit_tiny_patch16_224",
    image_size=16,
    patch_size=4,
    pos_embed="learned",
    kwargs={"depth": 2, "embed_dim": 16, "num_heads": 2, "global_pool": "avg"},
)
RESNET = EncoderConfig(
    name="resnet10t", image_size=32, kwargs={"channels": [4, 6, 8, 12], "stem_width": 8, "layers": [1, 1, 1, 1]}
)


def classifier(encoder=VIT, findings=False, **options) -> Classifier:
    torch.manual_seed(0)
    return Classifier(
        build_encoder(encoder, seed=0),
        FineTuneOptions(**options),
        CLASSES,
        image_size=encoder.size,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        findings=findings,
    )


def config(**optimizer) -> Config:
    return Config.model_validate(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": VIT.model_dump(),
            "objective": {"name": "fine_tune"},
            "train": {"epochs": 10, "global_batch": 256},
            "optimizer": {"lr": 1.0, "betas": [0.9, 0.999], "decay_tokens": False} | optimizer,
        }
    )


def labelled_batch(model: Classifier, labels):
    from dataclasses import replace

    batch = blank_batch(model.views, len(labels))
    pixels = torch.randint(0, 256, batch.views[0].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return replace(batch, views=(pixels,), labels=torch.tensor(labels))


def test_the_head_starts_at_almost_nothing_and_the_loss_at_that_of_guessing():
    torch.manual_seed(0)
    model = classifier()
    weight = model.head.weight.detach()
    assert model.head.bias.abs().max() == 0
    assert stats.kstest(weight.flatten().numpy() / 2e-5, "norm").pvalue > 0.01
    loss = model(labelled_batch(model, [2, 3, 7, 11]), Progress(0, 10, 1.0)).total
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-3)


def test_targets_are_timms_smoothed_ones():
    labels = torch.tensor([7, 2, 11, 3])
    expected = mixup_target(torch.tensor([2, 0, 3, 1]), 4, smoothing=0.1)
    torch.testing.assert_close(class_targets(labels, CLASSES, 0.1), expected)


def test_losses_are_timms():
    logits, targets = torch.randn(6, 4), torch.rand(6, 4).softmax(1)
    ours = {loss: classifier(loss=loss).loss(logits, targets).total for loss in ("softmax", "sigmoid")}
    torch.testing.assert_close(ours["softmax"], SoftTargetCrossEntropy()(logits, targets))
    torch.testing.assert_close(ours["sigmoid"], BinaryCrossEntropy(smoothing=0.0)(logits, targets))


@pytest.mark.parametrize("encoder", [VIT, RESNET], ids=["vit", "resnet"])
def test_the_average_follows_the_weights_as_a_loop_does(encoder):
    model = classifier(encoder, ema_decay=0.8)
    names = [name for name in model.state_dict() if name.startswith(("encoder.", "head."))]
    expected = {name: model.state_dict()[name].double().clone() for name in names}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        model(labelled_batch(model, [2, 3, 7, 11]), Progress(step, 3, 1.0)).total.backward()
        optimizer.step()
        model.after_step(Progress(step + 1, 3, 1.0), torch.ones(()))
        for name in names:
            now = model.state_dict()[name].double()
            expected[name] = 0.8 * expected[name] + 0.2 * now if model.state_dict()[name].is_floating_point() else now
    for name in names:
        average = model.state_dict()[f"average.module.{name}"]
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)
    moved = model.state_dict()["head.weight"] - model.state_dict()["average.module.head.weight"]
    assert moved.abs().max() > 1e-4
    assert model.exported_encoder() is model.average.module["encoder"]
    batch = labelled_batch(model, [2, 3])
    before = model.eval().scores(batch)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    assert torch.equal(model.scores(batch), before)  # what is tested is the average


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_what_is_exported_before_the_first_validation_is_what_is_trained(ema_decay):
    model = classifier(ema_decay=ema_decay, hold_out=0.2, patience=2)
    current = model.average.module if ema_decay else {"encoder": model.encoder}
    assert model.exported_encoder() is current["encoder"]
    for score, step in ((math.nan, 1), (50, 2), (40, 3)):
        model.held_out.test = lambda current, score=score: Found({"top1": Percent(score, None)}, 100, 0)
        model.has_ended(Progress(step, 3, 1.0))
        kept = model.held_out.kept["encoder"]
        assert model.exported_encoder() is (current["encoder"] if math.isnan(score) else kept)


@pytest.mark.parametrize("encoder", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_refused_step_leaves_the_average_as_it_was(encoder):
    model = classifier(encoder, ema_decay=0.8)
    before = {name: value.clone() for name, value in model.average.state_dict().items()}
    with torch.no_grad():
        for value in [*model.encoder.parameters(), *model.head.parameters()]:
            value.add_(1.0)
    for applied in (0.0, 1.0):
        model.after_step(Progress(1, 3, 1.0), torch.tensor(applied))
        same = [torch.equal(value, before[name]) for name, value in model.average.state_dict().items()]
        assert all(same) == (applied == 0)


ANSWERS = [[1.0, 0.0, math.nan, -1.0], [math.nan] * 4, [0.0, 1.0, -1.0, 0.0], [1.0, 1.0, 0.0, math.nan]]
OF_CLASSES = {
    "mixup and CutMix": {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
    "MaskMix with TransMix": {"mixup": 0.8, "cutmix": 1.0, "cutmix_cell": 8, "attention_labels": "transmix"},
    "CutMix with MixPro": {"cutmix": 1.0, "attention_labels": "mixpro"},
}
OF_FINDINGS = {
    "unknown findings": {"loss": "sigmoid"},
    "uncertain and mixed findings": {"loss": "sigmoid", "uncertain": "smoothed", "mixup": 0.8, "cutmix": 1.0},
}


@pytest.mark.parametrize("name", OF_CLASSES | OF_FINDINGS)
def test_the_host_waits_for_nothing_between_two_steps(name):
    findings = name in OF_FINDINGS
    model = classifier(findings=findings, ema_decay=0.9, **(OF_CLASSES | OF_FINDINGS)[name])
    batch = labelled_batch(model, ANSWERS if findings else [2, 3, 7, 11])
    for step in range(2):  # what is made once, such as constants, is made in the first
        with counting_waits() as found:
            model(batch, Progress(step, 10, 1.0)).total.backward()
            model.after_step(Progress(step + 1, 10, 1.0), torch.ones(()))
    with counting_waits() as of_one_hot:  # on a CPU alone it looks whether all classes are there
        torch.nn.functional.one_hot(torch.zeros(4, dtype=torch.int64), 4)
    expected = [] if findings else of_one_hot
    assert [line.split()[0] for line in found] == [line.split()[0] for line in expected], "\n".join(found)


def test_each_parameter_is_stepped_at_its_layers_rate():
    model = classifier(layer_decay=0.5, head_lr_ratio=3.0)
    optimizer = build_optimizer(model, config(), model.lr_scales())
    apply_schedule(optimizer.param_groups, config(), Progress(4, 100, 10.0))
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    full = max(rate for rate, _ in rates.values()) / 3
    table = {  # name: (share of the rate, decayed)
        "encoder.cls_token": (0.125, False),
        "encoder.pos_embed": (0.125, False),
        "encoder.patch_embed.proj.weight": (0.125, True),
        "encoder.blocks.0.attn.qkv.weight": (0.25, True),
        "encoder.blocks.0.attn.qkv.bias": (0.25, False),
        "encoder.blocks.1.norm1.weight": (0.5, False),
        "encoder.fc_norm.weight": (1.0, False),
        "head.weight": (3.0, True),
        "head.bias": (3.0, False),
    }
    parameters = dict(model.named_parameters())
    for name, (share, decayed) in table.items():
        rate, decay = rates[id(parameters[name])]
        assert rate == pytest.approx(full * share), name
        assert decay == (0.05 if decayed else 0.0), name
    assert len(rates) == len(parameters)


def test_the_plain_optimizer_is_as_it_was():
    model = classifier()
    assert [group["name"] for group in build_optimizer(model, config(), model.lr_scales()).param_groups] == [
        "decayed",
        "spared",
    ]


def test_mixing_is_in_the_loss_and_only_in_training():
    mixed, plain = classifier(mixup=0.8, cutmix=1.0), classifier()
    batch = labelled_batch(plain, [2, 3, 7, 11])
    with torch.no_grad():
        for model in (mixed, plain):
            model.head.weight.copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    progress = Progress(0, 10, 1.0)
    assert mixed(batch, progress).total != plain(batch, progress).total
    assert torch.equal(mixed.scores(batch), plain.scores(batch))


@pytest.mark.parametrize("size", [(16, 1.0), (128, 0.875), (224, 0.875), (384, 1.0)])
def test_the_test_view_is_one_fixed_crop(size):
    from prelude.evaluators.finetuning.classifier import _test_view

    view = _test_view(FineTuneOptions(), (size[0], size[0]))
    assert (view.crop, view.crop_share, view.flip, view.augment) == ("center", size[1], 0.0, None)
    assert _test_view(FineTuneOptions(test_crop_share=0.95), (224, 224)).crop_share == 0.95


def test_the_train_view_is_what_the_options_say():
    view = classifier(augment={"magnitude": 5}, crop_scale=(1.0, 1.0), shift=2, flip=0.0).views.views[0]
    assert (view.crop, view.shift, view.flip, view.augment.magnitude) == ("center", 2, 0.0, 5)
    assert view.augment.fill == (128, 128, 128)
    assert classifier(crop_scale=(0.3, 1.0)).views.views[0].scale == (0.3, 1.0)


def test_trivial_augment_fills_with_black_and_rand_augment_with_the_mean():
    for policy, fill in {"trivial": (0, 0, 0), "rand": (128, 128, 128)}.items():
        assert classifier(augment={"policy": policy}).views.views[0].augment.fill == fill


def test_crops_of_training_and_test_are_resized_alike():
    for interpolation in ("bicubic", "bilinear"):
        model = classifier(interpolation=interpolation)
        views = model.views.views + model.test_views.views
        assert [view.interpolation for view in views] == [interpolation, interpolation]


@pytest.mark.parametrize("std", [2e-5, 0.01])
def test_the_head_starts_as_large_as_the_recipe_says(std):
    head = classifier(head_std=std).head
    assert head.bias.abs().max() == 0
    assert head.weight.std().item() == pytest.approx(std, rel=0.3)


def test_a_uniform_head_is_torch_s_own_layer():
    ours, bound = classifier(head_std="uniform").head, 1 / 16**0.5
    drawn = torch.cat([ours.weight.flatten(), ours.bias]).detach() / bound
    assert stats.kstest(drawn.numpy(), "uniform", args=(-1, 2)).pvalue > 0.01


def test_under_lamb_a_head_of_almost_nothing_stands_still():
    """What the setting is for: a step of LAMB is as large as the weight."""
    moved = {}
    for std in (2e-5, "uniform"):
        model = classifier(head_std=std)
        before = model.head.weight.detach().clone()
        optimizer = build_optimizer(model, config(name="lamb", lr=1e-3), model.lr_scales())
        for _ in range(5):
            optimizer.zero_grad()
            model(labelled_batch(model, [2, 3, 7, 11]), Progress(0, 10, 1.0)).total.backward()
            optimizer.step()
        moved[std] = (model.head.weight.detach() - before).norm().item()
    assert moved[2e-5] < 1e-6 and moved["uniform"] > 1e-3


def test_what_an_encoder_lacks_is_told_by_the_keys_of_the_recipe():
    own = EncoderConfig(name="own_networks:small_transformer", image_size=16)
    opened = OpenedEncoder(build_encoder(own, seed=0), own, (0.5,) * 3, (0.2,) * 3, "mine", "weights")
    with pytest.raises(UserError, match=r"^objective.drop_path=0.1 is handed to .* objective.drop_path=0, or give"):
        encoder_config(opened, FineTuneOptions(drop_path=0.1))
    assert encoder_config(opened, FineTuneOptions(drop_path=0)).kwargs == {}
    with pytest.raises(UserError, match=r"write one, or objective.layer_decay=1\.$"):
        classifier(own, pooling="own", layer_decay=0.75).lr_scales()
