"""Sparse encodings of timm convnets: what they see, what they compute, and what they leave alone."""

import copy

import masked_dense
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from prelude.data.errors import UserError
from prelude.objectives.active_positions import ActivePositions
from prelude.objectives.sparse_encoder import SparseEncoder

FAMILIES = {
    "resnet18": {"channels": [8, 12, 16, 20], "layers": [1, 1, 1, 1]},
    "resnet26d": {"channels": [8, 12, 16, 20], "layers": [1, 1, 1, 1]},  # deep stem, average pooling in shortcuts
    "resnet10t": {"channels": [8, 12, 16, 20], "stem_width": 8},
    "seresnet18": {"channels": [8, 12, 16, 20], "layers": [1, 1, 1, 1]},
    "ecaresnet26t": {"channels": [8, 12, 16, 20], "layers": [1, 1, 1, 1]},
    "resnet50_gn": {"channels": [32, 32, 32, 32], "layers": [1, 1, 1, 1]},
    "resnetv2_18": {"channels": [8, 12, 16, 20], "layers": [1, 1, 1, 1]},  # batch norm and activation in one layer
    "nf_regnet_b0": {"depths": [1, 1, 1, 1], "channels": [16, 16, 16, 16], "group_size": 8, "stem_chs": 8},
    "densenet121": {"block_config": [1, 2, 2, 1]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]},
    "convnext_nano_ols": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]},  # overlapping stem
    "convnextv2_atto": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]},  # 1x1 convolutions for an MLP
    "convnextv2_tiny": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]},  # linear layers for an MLP
    "regnety_002": {},
    "tf_mobilenetv3_small_minimal_100": {},  # padding depends on the size
    "mobilenetv3_small_050": {},
}
PIXELS, CELL, GRID = 96, 32, (3, 3)


def a_model(name, **kwargs):
    """With random numbers where an untrained model has zeros and ones, so that nothing hides."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **kwargs).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.abs().max() == 0 or "grn" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    for key, value in model.named_buffers():
        if value.is_floating_point() and "running" in key:
            value += torch.rand_like(value)
    return model


def some_images(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)


SCATTERED = torch.tensor([[8, 0, 4, 5], [3, 1, 2, 7]])  # cells in any order
CORNERS = [(0, 1), (1, 0)]  # of a rectangle of 2 x 2 cells in each image
RECTANGLES = torch.tensor([[row * 3 + column for row in (r, r + 1) for column in (c, c + 1)] for r, c in CORNERS])


def dense_maps(encoded):
    return [encoded.positions.unpack(packed) for packed in encoded.maps]


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max().clamp_min(1e-12)).item()


@pytest.mark.parametrize(
    ("name", "training"), [(name, True) for name in FAMILIES] + [("resnet26d", False), ("mobilenetv3_small_050", False)]
)
def test_a_visible_rectangle_is_encoded_as_plain_timm_encodes_the_crop(name, training):
    model = a_model(name, **FAMILIES[name]).train(training)
    plain = copy.deepcopy(model)
    images = some_images()
    crops = [
        image[:, r * CELL : (r + 2) * CELL, c * CELL : (c + 2) * CELL]
        for image, (r, c) in zip(images, CORNERS, strict=True)
    ]
    expected = plain.forward_intermediates(torch.stack(crops), intermediates_only=True)
    maps = dense_maps(SparseEncoder(model)(images, RECTANGLES, GRID))
    for ours, reference in zip(maps, expected, strict=True):
        side = ours.shape[-1] // 3
        for i, (r, c) in enumerate(CORNERS):
            assert relative(ours[i, :, r * side : (r + 2) * side, c * side : (c + 2) * side], reference[i]) < 1e-9
        inside = F.interpolate(is_visible(RECTANGLES), size=ours.shape[-2:]) > 0
        assert ours.masked_select(~inside).abs().max() == 0
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=key)


def is_visible(visible):
    return torch.zeros(len(visible), 9, dtype=torch.float64).scatter_(1, visible, 1).view(-1, 1, *GRID)


MASKED = ["resnet18", "resnet26d", "seresnet18", "resnetv2_18", "convnext_atto", "convnextv2_atto", "convnextv2_tiny"]


@pytest.mark.parametrize(
    "name", [name for name in MASKED if name != "resnet26d"] + ["regnety_002", "mobilenetv3_small_050"]
)
def test_maps_and_gradients_are_those_of_masked_whole_maps(name):
    model, images = a_model(name, **FAMILIES[name]), some_images()
    sparse = SparseEncoder(model)

    def gradients(maps):
        model.zero_grad()
        sum(
            (features * torch.linspace(-1, 1, features[0].numel()).view_as(features[0])).sum() for features in maps
        ).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    reference = masked_dense.encode(model, images, SCATTERED, GRID)
    expected = gradients(reference)
    maps = dense_maps(sparse(images, SCATTERED, GRID))
    for ours, theirs in zip([*maps, *gradients(maps)], [*reference, *expected], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * float(theirs.detach().abs().max()) + 1e-10)


@pytest.mark.parametrize("name", ["resnet26d", "convnextv2_atto", "tf_mobilenetv3_small_minimal_100"])
def test_hidden_pixels_never_reach_the_encoder(name):
    model, images = a_model(name, **FAMILIES[name]).eval(), some_images()
    sparse = SparseEncoder(model)
    before = sparse(images, SCATTERED, GRID).maps
    hidden = F.interpolate(is_visible(SCATTERED), size=(PIXELS, PIXELS)) == 0
    after = sparse(images.masked_fill(hidden, torch.nan), SCATTERED, GRID).maps
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    visible = sparse(images + ~hidden, SCATTERED, GRID).maps
    assert not any(torch.equal(one, two) for one, two in zip(before, visible, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["resnet26d", "convnextv2_atto"])
def test_with_every_cell_visible_it_is_the_dense_encoder(name, training):
    model, images = a_model(name, **FAMILIES[name]).train(training), some_images()
    plain = copy.deepcopy(model)
    maps = dense_maps(SparseEncoder(model)(images, torch.randperm(9).expand(2, -1), GRID))
    for ours, reference in zip(maps, plain.forward_intermediates(images, intermediates_only=True), strict=True):
        assert relative(ours, reference) < 1e-9
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("name", ["resnet26d", "convnextv2_atto", "mobilenetv3_small_050"])
def test_outside_of_an_encoding_it_is_timm_to_the_bit(name):
    model, images = a_model(name, **FAMILIES[name]).eval(), some_images()
    plain = copy.deepcopy(model)
    classes = [type(layer) for layer in model.modules()]
    maps = SparseEncoder(model)(images, SCATTERED, GRID).maps
    sum(features.sum() for features in maps).backward()
    assert torch.equal(model(images), plain(images))
    assert [type(layer) for layer in model.modules()] == classes
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


# ---- single layers against references written as loops


class Layers(nn.Sequential):
    """Layers as an encoder with one map."""

    def forward_intermediates(self, x, intermediates_only):
        return [self(x)]


def encode(layer, images, visible, grid):
    encoded = SparseEncoder(Layers(layer))(images, visible, grid)
    return encoded.positions.unpack(encoded.maps[0])


CONVOLUTIONS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, padding=1, stride=2),
    dict(kernel_size=3, padding=2, dilation=2),
    dict(kernel_size=3, padding=1, groups=2),
    dict(kernel_size=7, padding=3, groups=4),
    dict(kernel_size=2, stride=2),
    dict(kernel_size=4, stride=4),
    dict(kernel_size=1, stride=2),
    dict(kernel_size=1),
    dict(kernel_size=(1, 5), padding=(0, 2)),
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_is_submanifold(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **options).double()
    images = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    visible, grid = torch.tensor([[0, 2], [3, 1]]), (2, 2)
    shown = torch.zeros(2, 4).scatter_(1, visible, 1).view(2, 2, 2)
    ours = encode(conv, images, visible, grid)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    rows, columns = 8 // sh, 8 // sw
    width = 4 // conv.groups
    for b in range(2):
        for y in range(rows):
            for x in range(columns):
                if not shown[b, y * 2 // rows, x * 2 // columns]:
                    assert (ours[b, :, y, x] == 0).all()
                    continue
                expected = conv.bias.clone()
                for i in range(kh):
                    for j in range(kw):
                        v, u = y * sh - ph + i * dh, x * sw - pw + j * dw
                        if 0 <= v < 8 and 0 <= u < 8 and shown[b, v // 4, u // 4]:
                            taps = images[b, :, v, u].view(conv.groups, width, 1)
                            kernels = conv.weight[:, :, i, j].view(conv.groups, -1, width)
                            expected = expected + (kernels @ taps).flatten()
                torch.testing.assert_close(ours[b, :, y, x], expected, rtol=1e-12, atol=1e-12)


def test_the_best_of_a_window_is_an_active_one_even_below_zero():
    images = -1 - torch.rand(1, 2, 4, 4)
    visible = torch.tensor([[0, 3]])
    ours = encode(nn.MaxPool2d(3, 2, 1), images, visible, (2, 2))
    torch.testing.assert_close(ours[..., 0, 0], images[..., :2, :2].amax((2, 3)))
    torch.testing.assert_close(ours[..., 1, 1], images[..., 2:, 2:].amax((2, 3)).maximum(images[..., 1, 1]))
    assert (ours[..., 0, 1] == 0).all() and (ours[..., 1, 0] == 0).all()


@pytest.mark.parametrize("options", [(3, 1, 1), (3, 2, 1), (2, 2, 0)], ids=str)
@pytest.mark.parametrize("counts_padding", [True, False])
def test_the_average_of_a_window_is_that_of_its_active_positions(options, counts_padding):
    pool = nn.AvgPool2d(*options, count_include_pad=counts_padding)
    images = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    shown = torch.ones(8, 8)
    shown[:4, 4:] = 0
    ours = encode(pool, images, torch.tensor([[0, 2, 3]]), (2, 2))
    size, stride, padding = options
    for y in range(8 // stride):
        for x in range(8 // stride):
            total, count = torch.zeros(2, dtype=torch.float64), 0
            for v in range(y * stride - padding, y * stride - padding + size):
                for u in range(x * stride - padding, x * stride - padding + size):
                    if not (0 <= v < 8 and 0 <= u < 8):
                        count += counts_padding
                    elif shown[v, u]:
                        total, count = total + images[0, :, v, u], count + 1
            active = shown[y * stride, x * stride] > 0
            torch.testing.assert_close(ours[0, :, y, x], total / count if active else torch.zeros_like(total))


NORMS = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "batch norm that keeps a plain average": lambda: nn.BatchNorm2d(4, momentum=None),
    "layer norm": lambda: timm.layers.LayerNorm2d(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "global response norm": lambda: GlobalResponseNorm(4, channels_last=False),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_the_plain_one_on_gathered_positions(name):
    torch.manual_seed(0)
    norm = NORMS[name]().double()
    for parameter in norm.parameters():
        parameter.data = torch.randn_like(parameter)
    plain = copy.deepcopy(norm)
    images = 3 + torch.randn(2, 4, 6, 6, dtype=torch.float64)
    visible = torch.tensor([[0, 4, 8], [1, 2, 6]])
    shown = is_visible(visible).repeat_interleave(2, 2).repeat_interleave(2, 3).bool()
    ours_in, plain_in = images.clone().requires_grad_(), images.clone().requires_grad_()
    ours = encode(norm, ours_in, visible, GRID)
    gathered = torch.stack([image[:, where[0]] for image, where in zip(plain_in, shown, strict=True)])  # (B, C, 12)
    expected = plain(gathered[..., None])[..., 0]
    for map_, where, values in zip(ours, shown, expected, strict=True):
        torch.testing.assert_close(map_[:, where[0]], values)
        assert (map_[:, ~where[0]] == 0).all()
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (expected * torch.stack([w[:, where[0]] for w, where in zip(weights, shown, strict=True)])).sum().backward()
    torch.testing.assert_close(ours_in.grad, plain_in.grad)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value)


def test_batch_norm_by_hand():
    """Active values 1, 3, 5 and 3: mean 3, biased variance 2, unbiased 8/3."""
    norm = nn.BatchNorm2d(1)
    images = torch.tensor([[[[1.0, 9.0], [3.0, 7.0]]], [[[5.0, 2.0], [3.0, 4.0]]]])
    ours = encode(norm, images, torch.tensor([[0, 2], [0, 2]]), (2, 2))
    torch.testing.assert_close(
        ours[:, 0, :, 0], torch.tensor([[-1.0, 0.0], [1.0, 0.0]]) * (2 / (2 + 1e-5)) ** 0.5 * 2**0.5
    )
    assert norm.running_mean.item() == pytest.approx(0.3)
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * 8 / 3)


def test_an_image_does_not_change_its_neighbours_through_global_response_norm():
    model, images = a_model("convnextv2_atto", **FAMILIES["convnextv2_atto"]), some_images()
    sparse = SparseEncoder(model)
    before = sparse(images, SCATTERED, GRID).maps
    images[1] = 5 * torch.randn_like(images[1])
    after = sparse(images, SCATTERED, GRID).maps
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one[0], two[0])
        assert not torch.allclose(one[1], two[1])


# ---- whose cells are visible


def gradients_of(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "convnextv2_tiny"])
def test_recomputed_encodings_have_the_gradients_of_kept_ones(name):
    """Two encodings with other cells, backward in either order, apart and as one loss."""
    model, images = a_model(name, **FAMILIES[name]).eval(), some_images()
    sparse = SparseEncoder(model)
    other = SCATTERED.flip(0)

    def losses():
        return [
            sum((k * features).square().sum() for k, features in enumerate(sparse(images, cells, GRID).maps, 1))
            for cells in (SCATTERED, other)
        ]

    expected = gradients_of(model, losses())
    assert not torch.equal(losses()[0], losses()[1])
    model.set_grad_checkpointing(True)
    for arrangement in (lambda: losses(), lambda: losses()[::-1], lambda: [sum(losses())]):
        for key, grad in gradients_of(model, arrangement()).items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-12, msg=key)
    plain = copy.deepcopy(model)
    assert torch.equal(model(images), plain(images))  # after all of it, dense as ever


def test_two_models_do_not_meet():
    first, second = (a_model("resnet18", **FAMILIES["resnet18"]) for _ in range(2))
    images = some_images()
    alone = SparseEncoder(copy.deepcopy(first))(images, SCATTERED, GRID).maps[-1]
    one, two = SparseEncoder(first), SparseEncoder(second)
    inner = []
    first.layer1[0].register_forward_hook(lambda *_: inner.append(two(images, SCATTERED.flip(0), GRID).maps[-1]))
    torch.testing.assert_close(one(images, SCATTERED, GRID).maps[-1], alone)
    assert not torch.allclose(inner[0], alone)


def test_an_encoding_within_an_encoding_of_the_same_model_has_cells_of_its_own():
    model, images = a_model("resnet18", **FAMILIES["resnet18"]).eval(), some_images()
    sparse = SparseEncoder(model)
    expected = [sparse(images, cells, GRID).maps[-1] for cells in (SCATTERED, SCATTERED.flip(0))]
    inner = []

    def within(*_):
        if not inner:
            inner.append(None)
            inner.append(sparse(images, SCATTERED.flip(0), GRID).maps[-1])

    model.layer1[0].register_forward_hook(within)
    outer = sparse(images, SCATTERED, GRID).maps[-1]
    assert torch.equal(outer, expected[0]) and torch.equal(inner[1], expected[1])


def test_after_an_error_the_encoder_is_plain_timm_again():
    model, images = a_model("resnet18", **FAMILIES["resnet18"]).eval(), some_images()
    expected = model(images)
    sparse = SparseEncoder(model)
    with pytest.raises(UserError, match="is no whole number for each of 5 x 5 masked cells"):
        sparse(images, torch.tensor([[0], [1]]), (5, 5))
    with pytest.raises(UserError, match="a map of 3 x 3 positions is no whole number for each of 6 x 6 masked cells"):
        sparse(images, torch.tensor([[0], [1]]), (6, 6))
    assert torch.equal(model(images), expected)


def test_a_copy_of_a_model_encodes_with_cells_of_its_own():
    model = a_model("resnet18", **FAMILIES["resnet18"]).eval()
    SparseEncoder(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(some_images()), model(some_images()))


def test_an_enlarged_map_repeats_active_positions():
    images = torch.randn(1, 2, 4, 4)
    ours = encode(nn.Upsample(scale_factor=2), images, torch.tensor([[1, 2]]), (2, 2))
    expected = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected[..., :4, :4] = expected[..., 4:, 4:] = 0
    torch.testing.assert_close(ours, expected)


def test_positions_of_cells_are_where_they_should_be():
    positions = ActivePositions(torch.tensor([[3, 0], [1, 2]]), (2, 2))
    maps = torch.arange(2 * 4 * 6).view(2, 1, 4, 6).float()
    packed = positions.pack(maps)  # cells of 2 x 3
    assert packed[0, 0, 0].tolist() == [15, 16, 17, 21, 22, 23, 0, 1, 2, 6, 7, 8]
    assert packed[1, 0, 0].tolist() == [27, 28, 29, 33, 34, 35, 36, 37, 38, 42, 43, 44]
    whole = positions.unpack(packed, fill=-1.0)
    assert (whole == torch.where(torch.isin(maps, packed), maps, -1.0)).all()
    onto = positions.unpack_onto(packed, torch.tensor([-1.0]))
    assert torch.equal(onto, whole)
