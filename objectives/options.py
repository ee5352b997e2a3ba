"""The settings of our objectives: what a config may say below `objective`, checked without importing torch.

Each objective's own file says what its settings do to the method. What cannot be told from the settings alone (whether
they suit an encoder) is told by the objective's `check`.
"""

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from prelude.pretrain.options import AreaRange, Count, Options, Positive, Text

Strategy = Literal["otsu_components", "quantiles"]  # how DSeq-JEPA cuts regions, see `regions`


class ColourOptions(Options):
    """Probabilities and strengths, with torchvision's meaning. The defaults are those of BYOL that both views share."""

    jitter: float = Field(0.8, ge=0, le=1)  # probability of the next four, in random order
    brightness: float = Field(0.4, ge=0)  # factor drawn from 1 - b to 1 + b
    contrast: float = Field(0.4, ge=0)  # factor drawn from 1 - c to 1 + c
    saturation: float = Field(0.2, ge=0)  # factor drawn from 1 - s to 1 + s
    hue: float = Field(0.1, ge=0, le=0.5)  # turn drawn from -h to h; 0.5 is half the circle
    grey: float = Field(0.2, ge=0, le=1)  # probability of no colour
    blur: float = Field(0.0, ge=0, le=1)  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # its standard deviation, drawn from this range, in pixels of the view
    solarise: float = Field(0.0, ge=0, le=1)  # probability that bright values are inverted

    @field_validator("blur_sigma")
    @classmethod
    def _is_a_range(cls, value):
        if not 0 < value[0] <= value[1]:
            raise ValueError("write two standard deviations above 0, such as [0.1, 2.0]")
        return value


class FirstView(ColourOptions):
    blur: float = Field(1.0, ge=0, le=1)


class SecondView(ColourOptions):
    blur: float = Field(0.1, ge=0, le=1)
    solarise: float = Field(0.2, ge=0, le=1)


class SeveralViewsOptions(Options):
    projector: list[int] = [8192, 8192, 8192]  # widths of its layers; the last is D
    flip: float = Field(0.5, ge=0, le=1)  # probability of a horizontal flip, of each view
    # Field that images of one group (a patient, a place, a track) have in common, such as json:patient: every second
    # view is then of another image of the group. None: all views are of one image.
    pair_by: Text | None = None
    singular_value_weight: float = Field(0.0, ge=0)  # of MSBReg's term on singular values, see `embedding_dynamics`
    brownian_weight: float = Field(0.0, ge=0)  # of its Brownian term

    @field_validator("projector")
    @classmethod
    def _has_layers(cls, value):
        if not value or min(value) < 1 or value[-1] < 2:
            raise ValueError("write the widths of one or more layers, such as [8192, 8192, 8192]")
        return value


class TwoViewsOptions(SeveralViewsOptions):
    crop_scale: AreaRange = (0.08, 1.0)  # area of the random crop, as a share of the image
    view_1: FirstView = FirstView()  # colours of the first view
    view_2: SecondView = SecondView()  # colours of the second


class BarlowTwinsOptions(TwoViewsOptions):
    off_diagonal_weight: float = Field(0.0051, ge=0)  # of the redundancy term, lambda in the paper
    loss_scale: float = Field(1.0, gt=0)  # multiplies loss and gradient; 1 / ranks gives the official gradient


class VICRegOptions(TwoViewsOptions):
    invariance_weight: float = Field(25.0, ge=0)  # of the distance between views
    variance_weight: float = Field(25.0, ge=0)  # of the hinge on each dimension's deviation
    covariance_weight: float = Field(1.0, ge=0)  # of what is off the covariance's diagonal


class MSBRegOptions(TwoViewsOptions):
    projector: list[int] = [4096, 256]
    predictor: list[int] = [4096]  # widths of its hidden layers; its last layer is as wide as the projector's
    num_views: int = Field(2, ge=2)  # of an image, with the colours of view_1 and view_2 in turn
    centroid: Literal["views", "mean"] = "views"  # what is drawn to the teacher's centroid: each view, or their mean
    singular_value_weight: float = Field(0.04, ge=0)
    brownian_weight: float = Field(0.1, ge=0)
    momentum: float = Field(0.99, ge=0, le=1)  # of the teacher, at the start
    momentum_end: float = Field(1.0, ge=0, le=1)  # at the end; half a cosine over the run

    @field_validator("predictor")
    @classmethod
    def _predictor_has_layers(cls, value):
        if not value or min(value) < 1:
            raise ValueError("write the widths of its hidden layers, such as [4096]")
        return value


class LeJEPAColours(ColourOptions):
    blur: float = Field(0.5, ge=0, le=1)
    solarise: float = Field(0.2, ge=0, le=1)


class LeJEPAOptions(SeveralViewsOptions):
    projector: list[int] = [2048, 2048, 64]
    num_global: int = Field(2, ge=1)  # views of the encoder's image size
    num_local: int = Field(6, ge=0)  # smaller views
    global_scale: AreaRange = (0.3, 1.0)  # area of a global view, as a share of the image
    local_scale: AreaRange = (0.05, 0.3)  # area of a local view
    local_size: Count | Literal["auto"] = "auto"  # pixels; auto: 7/16 of the image's side, cut to whole patches
    centre: Literal["global", "all"] = "global"  # the views whose mean all are drawn to
    sigreg_weight: float = Field(0.05, ge=0, le=1)  # of SIGReg beside the prediction, lambda in the paper
    num_directions: int = Field(1024, ge=1)  # that embeddings are projected on, drawn anew in every step
    num_knots: int = Field(17, ge=2)  # of the integral over t, from 0 to knot_max
    knot_max: Positive = 3.0  # where the integral over t ends
    colours: LeJEPAColours = LeJEPAColours()  # of every view

    @model_validator(mode="after")
    def _views_are_several(self):
        if self.num_global + self.num_local < 2:
            raise ValueError("num_global and num_local make one view, which has nothing to agree with; write 2 and 6")
        if not self.num_local and (self.local_size != "auto" or self.local_scale != (0.05, 0.3)):
            raise ValueError("local_size and local_scale have no effect at num_local=0; leave them out")
        return self


class IJEPAOptions(Options):
    num_targets: int = Field(4, ge=1)  # target blocks of an image
    target_scale: AreaRange = (0.15, 0.2)  # area of a target block, as a share of the image
    target_aspect: tuple[float, float] = (0.75, 1.5)  # height / width of a target block
    context_scale: AreaRange = (0.85, 1.0)  # area of the context block before targets are cut out
    masks: Literal["paper", "official"] = "paper"  # official: as the released code draws them, for parity
    predictor: Literal["repeat", "packed"] = "repeat"  # packed: all targets in one sequence, another computation
    predictor_dim: int = Field(384, ge=4)  # width of the predictor
    predictor_depth: int = Field(12, ge=1)  # its blocks
    predictor_num_heads: Count | Literal["encoder"] = "encoder"  # of its attention; encoder: as many as the encoder has
    momentum: float = Field(0.996, ge=0, le=1)  # of the teacher, at the start
    momentum_end: float = Field(1.0, ge=0, le=1)  # of the teacher, at the end; linear over the run
    depth_scaled_init: bool = False  # divide what block l adds by sqrt(2 l) at the start
    # Of the patch projection's initial weights. Beside its position, a patch of few pixels weighs little at the
    # official 0.02; balanced: multiplied by sqrt(768 / values of a patch), it weighs as much as one of 16 x 16 x 3.
    patch_init_std: Positive | Literal["balanced"] = 0.02
    crop_scale: AreaRange = (0.3, 1.0)  # area of the random crop, as a share of the image
    flip: float = Field(0.0, ge=0, le=1)  # probability of a horizontal flip
    contrastive_weight: float = Field(0.0, ge=0)  # of VICReg's terms beside the prediction; C-JEPA: 0.001
    contrastive_projector: list[int] = []  # widths of the layers before these terms; none: as they are

    @model_validator(mode="after")
    def _projector_is_read(self):
        default = type(self).model_fields["contrastive_projector"].default
        if not self.contrastive_weight and self.contrastive_projector != default:
            raise ValueError(
                "contrastive_projector has no effect at contrastive_weight=0; write 0.001, or leave it out"
            )
        if self.contrastive_projector and min(self.contrastive_projector) < 2:
            raise ValueError("contrastive_projector wants the widths of its layers, such as [3072, 3072, 3072]")
        return self

    @field_validator("target_aspect")
    @classmethod
    def _is_a_range(cls, value):
        if not 0 < value[0] <= value[1]:
            raise ValueError("write two ratios of height to width, such as [0.75, 1.5]")
        return value


class DSeqJEPAOptions(IJEPAOptions):
    num_regions: int = Field(5, ge=2)  # the most an image can have, the background included
    region_min_area: float = Field(0.02, ge=0, le=1)  # share of the image below which a component is background
    region_strategy: Strategy = "otsu_components"  # how regions are cut out of saliency, see `regions`
    # The teacher's whose attention is saliency, from 0; auto: the last but one
    saliency_block: int | Literal["auto"] = "auto"
    saliency_query: Literal["contextual", "parameter"] = "contextual"  # parameter: the learned token, before any block
    # Of the next region: a causal mask over one sequence, or encoded anew for each
    context: Literal["causal", "reencode"] = "causal"
    lambda_start: float = Field(0.0, ge=0, le=1)  # probability of regions rather than random blocks
    lambda_end: float = Field(1.0, ge=0, le=1)  # the same at the end of the run; linear between
    lambda_granularity: Literal["step", "sample", "region"] = "step"  # what lambda is drawn for
    loss_reduction: Literal["patch", "step"] = "patch"  # what counts the same within an image
    contrastive_projector: list[int] = [3072, 3072, 3072]  # widths of the layers before VICReg's terms

    @model_validator(mode="after")
    def _bands_are_no_components(self):
        usual = type(self).model_fields["region_min_area"].default
        if self.region_strategy == "quantiles" and self.region_min_area != usual:
            raise ValueError("region_min_area has no effect with region_strategy=quantiles; leave it out")
        return self


class MAEOptions(Options):
    mask_ratio: float = Field(0.75, gt=0, lt=1)  # share of the patches that is hidden
    mask_block: int = Field(1, ge=1)  # patches are hidden in squares of so many a side; 4 in Pixio
    decoder: Literal["self", "cross"] = "self"  # cross: CrossMAE's, whose queries see visible patches alone
    # Of all patches, that is predicted; None: all that are hidden
    predicted_share: float | None = Field(None, gt=0, lt=1)
    # Of the gradient map as a second target, with a decoder of its own; 0: none
    gradient_weight: float = Field(0.0, ge=0)
    norm_pix_loss: bool = True  # predict patches of mean 0 and variance 1 rather than plain pixels
    decoder_dim: int = Field(512, ge=4)  # width of the decoder
    decoder_depth: int = Field(8, ge=1)  # its blocks
    decoder_num_heads: int = Field(16, ge=1)  # of its attention
    crop_scale: AreaRange = (0.2, 1.0)  # area of the random crop, as a share of the image
    flip: float = Field(0.5, ge=0, le=1)  # probability of a horizontal flip

    @model_validator(mode="after")
    def _a_part_can_be_predicted(self):
        if self.predicted_share is not None and self.decoder != "cross":
            raise ValueError(
                "predicted_share leaves out patches that decoder=self shows to the others; write decoder=cross"
            )
        if self.predicted_share is not None and self.predicted_share > self.mask_ratio:
            raise ValueError(
                f"predicted_share={self.predicted_share} is more than the mask_ratio={self.mask_ratio} that is hidden; "
                "write 0.25, or leave it out"
            )
        return self


class Uni4EyeOptions(Options):
    """Those of MAE that suit volumes too, and the volumes' own."""

    mask_ratio: float = Field(0.5, gt=0, lt=1)  # share of the patches that is hidden, of images and volumes
    # Of the gradient map as a second target, with a decoder of its own; 0: none
    gradient_weight: float = Field(1.0, ge=0)
    norm_pix_loss: bool = False  # predict patches of mean 0 and variance 1 rather than plain pixels
    decoder_dim: int = Field(512, ge=4)  # width of the decoder
    decoder_depth: int = Field(8, ge=1)  # its blocks
    decoder_num_heads: int = Field(16, ge=1)  # of its attention
    crop_scale: AreaRange = (0.2, 1.0)  # area of an image's random crop, as a share of it
    flip: float = Field(0.0, ge=0, le=1)  # probability, of an image
    volume_size: tuple[Count, Count, Count] = (224, 224, 112)  # rows, columns, slices; volumes are resampled to it
    volume_patch: Count | tuple[Count, Count, Count] = 16  # voxels along each side, or along each of the three
    volume_channels: int = Field(1, ge=1)  # of a voxel
    volume_flip: float = Field(0.5, ge=0, le=1)  # probability, along each of a volume's axes
    volume_noise: float = Field(0.2, ge=0, le=1)  # probability of Gaussian noise
    mask_block: ClassVar[int] = 1
    decoder: ClassVar[str] = "self"
    predicted_share: ClassVar[None] = None

    @property
    def cube(self) -> tuple[int, int, int]:
        """(height, width, depth) of a volume's patch in voxels."""
        patch = self.volume_patch
        return patch if isinstance(patch, tuple) else (patch, patch, patch)

    @property
    def volume_grid(self) -> tuple[int, int, int]:
        """(rows, columns, depths) of patches."""
        return tuple(side // part for side, part in zip(self.volume_size, self.cube, strict=True))

    @model_validator(mode="after")
    def _volumes_are_whole_patches(self):
        fitting = [max(round(side / part), 1) * part for side, part in zip(self.volume_size, self.cube, strict=True)]
        if fitting != list(self.volume_size):
            raise ValueError(
                f"volume_size={list(self.volume_size)} is not a whole number of patches of {list(self.cube)} voxels; "
                f"write volume_size={fitting}, or another volume_patch"
            )
        if min(self.volume_size) < 3 and self.gradient_weight:
            raise ValueError(
                f"volume_size={list(self.volume_size)} is too flat for a gradient map, which needs 3 voxels along "
                "each axis; write more, or gradient_weight=0"
            )
        return self


class RotationOptions(Options):
    rotations: list[int] = [0, 90, 180, 270]  # degrees counter-clockwise; the paper also tries pairs of them
    # A random resized crop of this area, as a share of the image; None takes the largest centred square.
    crop_scale: AreaRange | None = (0.08, 1.0)
    shift: int = Field(0, ge=0)  # pixels; pads with black and crops at random, the paper's choice on CIFAR: 4
    flip: float = Field(0.5, ge=0, le=1)  # probability of a horizontal flip

    @field_validator("rotations")
    @classmethod
    def _are_quarter_turns(cls, value):
        if len(value) < 2 or len(set(value)) != len(value) or not set(value) <= {0, 90, 180, 270}:
            raise ValueError("write two or more of 0, 90, 180 and 270, each once")
        return value


class SimMIMOptions(Options):
    mask_ratio: float = Field(0.6, gt=0, lt=1)  # share of the cells that is hidden
    mask_patch: int = Field(32, ge=1)  # side of a cell in pixels, a multiple of the encoder's patch
    target_window: int | None = Field(None, ge=3)  # pixels; standardises the target locally, 47 in Swin V2
    crop_scale: AreaRange = (0.67, 1.0)  # area of the random crop, as a share of the image
    flip: float = Field(0.5, ge=0, le=1)  # probability of a horizontal flip

    @field_validator("target_window")
    @classmethod
    def _has_a_middle(cls, value):
        if value is not None and value % 2 == 0:
            raise ValueError("write an odd number of pixels, such as 47")
        return value


class MaskedCellsOptions(Options):
    mask_ratio: float = Field(0.6, gt=0, lt=1)  # share of the cells that is hidden
    flip: float = Field(0.5, ge=0, le=1)  # probability of a horizontal flip


class FCMAEOptions(MaskedCellsOptions):
    norm_pix_loss: bool = True  # predict cells of mean 0 and variance 1 rather than plain pixels
    decoder_dim: int = Field(512, ge=1)  # width of the decoder
    decoder_depth: int = Field(1, ge=1)  # its blocks
    crop_scale: AreaRange = (0.2, 1.0)  # area of the random crop, as a share of the image


class SparKOptions(MaskedCellsOptions):
    mask_patch: int | None = Field(None, ge=1)  # side of a cell in pixels; None: the encoder's total stride
    decoder_dim: int = Field(768, ge=1)  # width of the decoder at the coarsest map; halved with every doubling
    crop_scale: AreaRange = (0.67, 1.0)  # area of the random crop, as a share of the image


OPTIONS: dict[str, type[Options]] = {
    "barlow_twins": BarlowTwinsOptions,
    "dseqjepa": DSeqJEPAOptions,
    "fcmae": FCMAEOptions,
    "ijepa": IJEPAOptions,
    "lejepa": LeJEPAOptions,
    "mae": MAEOptions,
    "msbreg": MSBRegOptions,
    "rotation": RotationOptions,
    "simmim": SimMIMOptions,
    "spark": SparKOptions,
    "uni4eye": Uni4EyeOptions,
    "vicreg": VICRegOptions,
}
