"""The configuration of a run as typed sections. `recipes` reads it, `config_words` says what is wrong with it."""

import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.pretrain import recipe_yaml
from prelude.pretrain.collapse_config import CollapseConfig
from prelude.pretrain.log_config import LogConfig
from prelude.pretrain.options import AnyShards, Count, FilePath, Index, Positive, Section, Share, Text, number


class ShuffleConfig(Section):
    """How the endless order mixes shards; see data/order.py. Part of what a resume must find unchanged."""

    streams: int = Field(8, ge=1)  # places of the set that are read from in turn
    span: int = Field(256, ge=1)  # samples that are read where they lie, one after another
    window: int = Field(16384, ge=1)  # samples among which the next one is drawn


class SelectConfig(Section):
    """A part of a data set; see data/select.py."""

    keys: FilePath | None = None  # a text file with a key, or SHARD:KEY, on each line
    label: Text | None = None  # where the label is: cls, txt, json:FIELD
    values: list[int | Text] = []  # values of the label that are kept; other samples are left out
    share: float | None = Field(None, gt=0, lt=1)  # share of the samples that keys and values leave, drawn by seed
    seed: int = Field(0, ge=0, lt=2**31)  # seed by which the share is drawn

    @model_validator(mode="after")
    def _no_setting_without_effect(self):
        if not (self.keys or self.label or self.values or self.share):
            raise ValueError("write keys, label with values, or share")
        if bool(self.label) != bool(self.values):
            raise ValueError("label says where to look and values for what; write both")
        if self.seed and not self.share:
            raise ValueError("seed has no effect without share; write both")
        return self


class PartConfig(Section):
    """One of several data sets that are mixed."""

    shards: AnyShards  # paths, braces, *, folders or URLs
    weight: float = Field(gt=0)  # how often this set is drawn from, relative to the others
    image: Text | None = None  # extension of the image's member in a sample; None: any
    select: SelectConfig | None = None  # a part of its samples; None: all


def _low_and_high(value, instead: str):
    if isinstance(value, tuple) and not -math.inf < value[0] < value[1] < math.inf:
        raise ValueError(f"write {instead}")
    return value


class VolumesConfig(Section):
    """Volumes beside images, in batches of their own; for objectives that learn from both."""

    shards: AnyShards  # shards of .npy members; paths, braces, *, a folder, or URLs
    share: float = Field(0.5, gt=0, lt=1)  # share of the steps that are of volumes; the others are of images
    image: Text | None = None  # extension of the volume's member, such as oct.npy; None: any
    select: SelectConfig | None = None  # a part of the volumes; None: all
    range: tuple[float, float] | None = None  # values of volumes with more than 8 bits that are black and white

    @field_validator("range")
    @classmethod
    def _growing(cls, value):
        return _low_and_high(value, "[low, high] with low below high, such as [-1000, 400]")


class DataConfig(Section):
    shards: AnyShards | None = None  # paths, braces, *, a folder, or URLs; one or a list
    mix: dict[str, PartConfig] = {}  # several data sets by name, instead of shards
    image: Text | None = None  # extension of the image's member, such as left.jpg; None: any
    select: SelectConfig | None = None  # a part of the samples; None: all
    allow_commands: bool = Field(False, exclude=True)  # run what `pipe:` says; on the command line only, never kept
    num_samples: int | None = Field(None, ge=1)  # length of an epoch, only for shards that cannot be indexed
    channels: int = Field(3, ge=1)  # channels of an image: 3 RGB, 1 grey; any other number must be what images have
    range: tuple[float, float] | Literal["auto"] | None = None  # the stored values that become black and white
    max_pixels: int = Field(64 * 2**20, ge=1)  # largest image that is read; a larger JPEG is decoded at a smaller size
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"  # data workers of a rank; auto: by its cores
    start_method: Literal["auto", "fork", "forkserver", "spawn"] = "auto"  # of workers; auto: fork on Linux, else spawn
    max_bad_share: float = Field(0.01, ge=0, le=1)  # share of unreadable samples at which the run stops
    timeout_seconds: float = Field(300.0, gt=0)  # seconds without data after which the run stops
    cache_dir: Text | None = None  # where remote shards are kept on each node; None: in $PRELUDE_CACHE
    cache_gib: float = Field(64.0, gt=0)  # GiB of remote shards that are kept at most
    shuffle: ShuffleConfig = ShuffleConfig()  # how far samples are mixed
    # Mean of each channel, of pixels in [0, 1]
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="one for each channel")
    # Standard deviation of each channel, of pixels in [0, 1]
    std: tuple[Positive, ...] = Field((0.229, 0.224, 0.225), description="one for each channel")
    shown_channels: list[Index] = []  # channels that pictures show as red, green, blue, from 0; []: the first three
    volumes: VolumesConfig | None = None  # volumes that take turns with images, where an objective learns from both

    @field_validator("range")
    @classmethod
    def _growing(cls, value):
        return _low_and_high(value, "[low, high] with low below high, such as [0, 4095], or auto")

    @model_validator(mode="after")
    def _shards_or_a_mix(self):
        if not self.shards and not self.mix:
            raise ValueError("shards is missing; write data.shards=PATTERN, or a mapping data.mix of several data sets")
        if self.shards and self.mix:
            raise ValueError("shards and mix both say what the data are; write data.shards=null or data.mix={}")
        if len(self.mix) == 1:
            raise ValueError("mix has one data set, and nothing to mix it with; write it as data.shards")
        if name := next((name for name in self.mix if not re.fullmatch(r"[\w-]+", name)), None):
            raise ValueError(f"mix names a data set {name!r}; write letters, digits, _ and - alone")
        for key in ("image", "select", "num_samples"):
            if self.mix and getattr(self, key):
                below = f"data.mix.NAME.{key}" if key in PartConfig.model_fields else "no such key: parts are counted"
                raise ValueError(f"{key} has no effect beside mix; write {below}")
        return self

    @model_validator(mode="after")
    def _each_channel_has_its_own(self):
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(
                    f"{key} has {counted(len(getattr(self, key)), 'value')} and channels={self.channels}; write one "
                    f"for each channel, as `prelude shards info SHARDS --channels {self.channels}` tells them"
                )
        if not (all(0 <= mean <= 1 for mean in self.mean) and max(self.std) <= 1):
            raise ValueError(
                "mean and std are of pixels from 0 to 1; divide those of pixels from 0 to 255 by 255, or take what "
                "`prelude shards info SHARDS` tells"
            )
        if self.shown_channels and (len(self.shown_channels) > 3 or max(self.shown_channels) >= self.channels):
            raise ValueError(f"shown_channels takes one to three numbers from 0 to {self.channels - 1}")
        return self


def is_dropout(argument: str) -> bool:
    """Whether an argument of an encoder drops units, paths or patches, and so is of the training alone."""
    return "drop" in argument and argument.endswith("_rate")


class EncoderConfig(Section):
    name: Text  # an architecture of timm, or module:function of your own
    image_size: Count | tuple[Count, Count]  # pixels of a side; (height, width) where they differ
    # Pixels of a vision transformer's; (height, width) where they differ
    patch_size: Count | tuple[Count, Count] | None = None
    in_chans: int = Field(3, ge=1)  # filled in from data.channels
    pos_embed: Literal["sincos", "learned"] = "sincos"  # fixed 2-D table or a trained parameter; ViTs only
    norm_eps: float | None = Field(None, gt=0)  # epsilon of every LayerNorm; None: timm's own, mostly 1e-6
    kwargs: dict[str, Any] = {}  # passed to timm.create_model: depth, embed_dim, drop_path_rate, ...
    weights: str | None = None  # where the encoder's weights come from; None: drawn from the seed
    weights_fingerprint: str | None = None  # of those weights; filled in by the command, and checked where it is given
    own_parts: bool = False  # take an objective's decoder, predictor or projector from there too

    @field_validator("kwargs")
    @classmethod
    def _are_possible(cls, value):
        for name, given in value.items():
            if is_dropout(name) and not (type(given) in (int, float) and 0 <= given < 1):
                raise ValueError(f"write a number of 0 or more and below 1 for {name}")
            if isinstance(given, (int, float)) and not 0 <= given < math.inf:
                raise ValueError(f"write a finite number of 0 or more for {name}")
        return value

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def architecture(self) -> "EncoderConfig":
        """Without where its weights came from."""
        return self.model_copy(update={"weights": None, "weights_fingerprint": None, "own_parts": False})

    @model_validator(mode="after")
    def _own_parts_come_from_somewhere(self):
        for key in ("own_parts", "weights_fingerprint"):
            if getattr(self, key) and not self.weights:
                raise ValueError(f"{key} has no effect without weights; write encoder.weights=SOURCE, or leave it out")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"  # lars and lamb at ZeRO stage 0 alone
    lr: float = Field(gt=0)  # peak learning rate; lr_rule says for which batch
    lr_rule: Literal["per_256", "absolute"] = "per_256"  # per_256: the peak is lr x global_batch / 256; absolute: lr
    betas: tuple[Share, Share] = (0.9, 0.95)  # of adamw and lamb: how their two averages decay
    momentum: float = Field(0.9, ge=0, lt=1)  # momentum of sgd and lars
    nesterov: bool = False  # momentum by Nesterov's rule; sgd alone
    weight_decay: float = Field(0.05, ge=0)  # at the start of the run; constant, unless weight_decay_end is set
    weight_decay_end: float | None = Field(None, ge=0)  # reached at the end of the run; None: constant
    weight_decay_schedule: Literal["cosine", "linear"] = "cosine"  # how weight_decay gets to its end
    decay_tokens: bool = True  # whether class, mask and register tokens are decayed, as in the official code
    decay_vectors: bool = False  # whether biases and norms are decayed too
    # Factor of the encoder's rate, a layer; see pretrain/layer_decay.py; 1: none
    layer_decay: float = Field(1.0, gt=0, le=1)
    spared_lr_ratio: float = Field(1.0, gt=0)  # learning rate of what is not decayed, as a share of lr
    warmup_epochs: float = Field(0.0, ge=0)  # epochs in which the learning rate rises linearly to its peak
    warmup_lr: float = Field(0.0, ge=0)  # learning rate at which the warm-up starts, under the same rule as lr
    min_lr: float = Field(0.0, ge=0)  # learning rate at which the cosine ends, under the same rule as lr
    milestones: list[float] = []  # epochs at which the rate is multiplied by milestone_factor; replaces the cosine
    milestone_factor: float = Field(0.1, gt=0, lt=1)  # what each milestone multiplies the rate by
    reach_end: bool = False  # whether the last update has the schedules' last values, as in SparK's code
    first_step: Literal[0, 1] = 0  # the first update's number in the schedules: 0 in MAE's code, 1 in I-JEPA's

    @model_validator(mode="after")
    def _no_setting_without_effect(self):
        unread = {"sgd": "betas", "lars": "betas"}.get(self.name, "momentum")
        if self._is_set(unread):
            read = "momentum" if unread == "betas" else "betas"
            raise ValueError(f"{self.name} has no {unread}; write {read}")
        if self.nesterov and self.name != "sgd":
            raise ValueError(f"{self.name} has no nesterov; leave it out, or write name=sgd")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov has no effect at momentum=0; write momentum=0.9, or leave it out")
        if self.decay_vectors and self._is_set("spared_lr_ratio"):
            raise ValueError("decay_vectors leaves nothing undecayed for spared_lr_ratio; write one of the two")
        if self.milestones and self.min_lr:
            raise ValueError("min_lr ends the cosine, which milestones replace; write one of the two")
        if self.weight_decay_end is None and self._is_set("weight_decay_schedule"):
            raise ValueError("weight_decay_schedule has no effect without weight_decay_end; write both")
        if not self.milestones and self._is_set("milestone_factor"):
            raise ValueError("milestone_factor has no effect without milestones; write both")
        return self

    @model_validator(mode="after")
    def _lars_adapts_what_is_decayed(self):
        if self.name == "lars" and not (self.weight_decay and self.weight_decay_end != 0):
            raise ValueError("lars adapts only what is decayed; write a small weight_decay, such as 1e-6")
        if self.name == "lars" and self.decay_vectors:
            raise ValueError("lars would adapt biases and norms, whose size says nothing; leave decay_vectors out")
        return self

    @field_validator("milestones")
    @classmethod
    def _in_order(cls, value):
        if any(epoch <= 0 for epoch in value) or sorted(set(value)) != value:
            raise ValueError("write epochs above 0 in growing order, such as [60, 120, 160]")
        return value


class TrainConfig(Section):
    epochs: float = Field(gt=0, le=1_000_000)  # passes over the data, or a part of one
    global_batch: int = Field(ge=1)  # samples an optimizer step, over all ranks
    micro_batch: Count | Literal["auto"] = "auto"  # samples a rank holds at once; auto: no accumulation
    # Of forward and backward; weights stay float32; auto: what suits the device
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    freeze_encoder_steps: int = Field(0, ge=0)  # first steps in which an encoder that comes with weights stays as it is
    gradient_clipping: float = Field(0.0, ge=0)  # largest norm of all gradients together; 0: off
    zero_stage: Literal[0, 1, 2, 3] = 0  # what ranks share out: 1 optimizer state, 2 gradients, 3 weights
    gradient_checkpointing: bool = False  # compute activations again in backward, to hold fewer
    compile: bool = False  # use torch.compile, which needs a C compiler
    profile_steps: int = Field(0, ge=0)  # steps of each start for TensorBoard's profiler, after the first few; 0: none
    max_nonfinite_steps: int = Field(10, ge=1)  # steps in a row that are not applied, before the run stops
    rank_timeout_seconds: float = Field(600, gt=0)  # seconds that ranks wait for one that stalls before the run stops


class CheckpointConfig(Section):
    every_steps: int = Field(1000, ge=1)  # steps between two saves
    keep: int = Field(3, ge=1)  # how many of the newest checkpoints are kept


class ResumeConfig(Section):
    checkpoint: FilePath = "auto"  # auto: the run's newest valid one, if any; or the path of one
    allow_changed_data: bool = False  # go on although the data set is another one
    allow_changed_config: bool = False  # go on although settings that change the result do


class EvaluateConfig(Section):
    """Labelled shards that evaluations use for this run unless told otherwise, and how a small part of them judges the
    encoder while it trains."""

    train_shards: AnyShards  # labelled shards to learn from
    test_shards: AnyShards  # labelled shards to report on
    label: Text = "cls"  # where the label is: extension of the member (cls, txt), or json:FIELD
    classes: list[Text] = []  # names in the order of their numbers; []: sorted, where labels are text
    image: Text | None = None  # extension of the image's member, such as left.jpg; None: any
    train_select: SelectConfig | None = None  # a part of train_shards
    test_select: SelectConfig | None = None  # a part of test_shards
    label_names: list[Text] = []  # findings that `prelude multilabel` reads from a JSON member
    label_field: str = ""  # field of that member that holds the findings; "": the whole member
    label_group: str = ""  # field whose values group images, such as patient; for findings, and what is held out
    every_steps: int = Field(0, ge=0)  # steps between two evaluations (k-NN, a linear head) beside the run; 0: none
    num_train: int = Field(2000, ge=2)  # images to learn from, as many of each class as far as it goes
    num_test: int = Field(1000, ge=1)  # images to report on, drawn likewise
    device: Literal["auto", "cpu"] = "auto"  # where it computes; auto: on rank 0's accelerator, if there is one


class Config(Section):
    run_dir: FilePath  # where everything goes; the same folder again goes on
    seed: int = Field(0, ge=0, lt=2**31)  # seed of every random choice
    data: DataConfig  # what is learned from
    encoder: EncoderConfig  # what is trained
    objective: dict[str, Any]  # `name`, and the options of that objective
    train: TrainConfig  # how long, how much at once
    optimizer: OptimizerConfig  # and the schedules of its rates
    checkpoint: CheckpointConfig = CheckpointConfig()  # what is saved to go on from
    log: LogConfig = LogConfig()  # what is told, and where
    resume: ResumeConfig = ResumeConfig()  # what a start goes on from
    evaluate: EvaluateConfig | None = None  # how the run's encoder is judged; None: as each evaluation is told
    collapse: CollapseConfig = CollapseConfig()  # when features are taken for collapsed
    deepspeed: dict[str, Any] | FilePath = {}  # merged into what the engine builds; a dictionary or a JSON file

    @model_validator(mode="after")
    def _encoder_reads_what_images_have(self):
        if "in_chans" in self.encoder.model_fields_set and self.encoder.in_chans != self.data.channels:
            raise ValueError(
                f"encoder.in_chans={self.encoder.in_chans} follows from data.channels={self.data.channels}; write "
                "data.channels alone"
            )
        encoder = self.encoder.model_copy(update={"in_chans": self.data.channels})
        object.__setattr__(self, "encoder", encoder)  # a validator of a frozen model has no other way to fill in
        return self

    @model_validator(mode="after")
    def _lars_and_friends_need_whole_tensors(self):
        if self.optimizer.name in ("lars", "lamb") and self.train.zero_stage > 0:
            raise ValueError(
                f"optimizer.name={self.optimizer.name} needs the norm of each whole parameter, which ZeRO stage "
                f"{self.train.zero_stage} splits over ranks; write train.zero_stage=0, or optimizer.name=adamw"
            )
        return self

    @model_validator(mode="after")
    def _online_evaluation_needs_whole_weights(self):
        if self.evaluate and self.evaluate.every_steps and self.train.zero_stage == 3:
            raise ValueError(
                f"evaluate.every_steps={self.evaluate.every_steps} needs whole weights between steps, which ZeRO stage "
                "3 keeps in parts; write train.zero_stage=2, or evaluate.every_steps=0"
            )
        return self

    @model_validator(mode="after")
    def _online_evaluation_knows_classes(self):
        if self.evaluate and self.evaluate.every_steps and self.evaluate.label_names:
            raise ValueError(
                f"evaluate.every_steps={self.evaluate.every_steps} judges by class numbers, and evaluate.label_names "
                "says that images have several findings; write evaluate.every_steps=0, or no evaluate.label_names"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self):
        warmup, epochs = self.optimizer.warmup_epochs, self.train.epochs
        if warmup > epochs:
            raise ValueError(
                f"optimizer.warmup_epochs={number(warmup)} is longer than the run of train.epochs={number(epochs)}, "
                "whose learning rate would not reach its peak; write "
                f"optimizer.warmup_epochs={epochs / 10:.3g}, or more epochs"
            )
        return self

    @model_validator(mode="after")
    def _milestones_are_reached(self):
        late = [epoch for epoch in self.optimizer.milestones if epoch >= self.train.epochs]
        if late:
            raise ValueError(
                f"optimizer.milestones has {number(late[0])}, which a run of train.epochs={number(self.train.epochs)} "
                "never reaches; leave it out"
            )
        return self

    def batching(self, world_size: int) -> tuple[int, int]:
        """(samples a rank holds at once, micro-batches an optimizer step) at this number of ranks."""
        batch, micro = self.train.global_batch, self.train.micro_batch
        if micro == "auto":
            if batch % world_size:
                near = max(round(batch / world_size), 1) * world_size
                raise UserError(
                    f"train.global_batch={batch} cannot be shared equally by {counted(world_size, 'rank')}; "
                    f"write train.global_batch={near}."
                )
            return batch // world_size, 1
        if batch % (micro * world_size):
            near = max(round(batch / (micro * world_size)), 1) * micro * world_size
            raise UserError(
                f"train.global_batch={batch} is no multiple of {counted(world_size, 'rank')} x "
                f"train.micro_batch={micro}; write train.global_batch={near}, or another train.micro_batch."
            )
        return micro, batch // (micro * world_size)

    @property
    def peak_lr(self) -> float:
        return self.optimizer.lr * self.lr_factor

    @property
    def lr_factor(self) -> float:
        return self.train.global_batch / 256 if self.optimizer.lr_rule == "per_256" else 1.0

    def to_yaml(self) -> str:
        return recipe_yaml.dump(json.loads(self.model_dump_json()))
