"""The labelled shards that encoders are judged on: which, which part of them, and what their labels are."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from prelude.data.class_names import with_class_names
from prelude.data.decode import MAX_PIXELS, ValueRange
from prelude.data.select import Selection, selected
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.labels import VectorFormat
from prelude.pretrain.config import EvaluateConfig, SelectConfig


@dataclass(frozen=True)
class Labelled:
    """The shards that encoders are judged on."""

    train: str | Sequence[str]
    test: str | Sequence[str]
    label: str  # where the class is: extension of the member (cls, txt), or json:FIELD
    vectors: VectorFormat | None = None  # where that member says which of several findings there are
    value_range: ValueRange | Literal["auto"] | None = None  # of images with more than 8 bits, see `ShardIndex`
    max_pixels: int = MAX_PIXELS
    image: str = ""  # extension of the image's member; "": any
    classes: tuple[str, ...] = ()  # names in the order of their numbers; (): sorted, where labels are text
    train_select: Selection | None = None  # a part of the shards
    test_select: Selection | None = None
    group: str = ""  # a label whose value samples that belong together share, such as json:patient
    one_set: bool = False  # test alone, which is train as well: for what leaves each sample out in turn

    def opened(self) -> list[ShardIndex]:
        """Of train and test. Raises UserError as `ShardIndex`, and for a part that is not there."""
        read_as = (self.label, self.value_range, self.max_pixels, self.image)
        test = selected(ShardIndex(self.test, *read_as), self.test_select, "test_select")
        if self.one_set:
            return [test, test]
        train = ShardIndex(self.train, *read_as)
        return [selected(train, self.train_select, "train_select"), test]

    def indexes(self) -> list[ShardIndex]:
        """The same, which agree on the numbers of class names. Raises UserError for labels that are no classes, too."""
        return self.opened() if self.vectors else with_class_names(self.opened(), self.classes)

    def described(self, name: str, index: ShardIndex) -> dict:
        """Of train or test, for the record."""
        select = getattr(self, f"{name}_select")
        chosen = {"select": {key: value for key, value in asdict(select).items() if value}} if select else {}
        return {"shards": getattr(self, name), **chosen, "fingerprint": index.fingerprint}

    def described_labels(self, index: ShardIndex) -> dict:
        """What labels are, for the record: names of classes in the order of their numbers, where they have any."""
        found = {"label": self.label}
        if index.classes:
            found["classes"] = list(index.classes)
        if self.image:
            found["image"] = self.image
        return found


def labelled_section(section: EvaluateConfig, value_range=None, max_pixels: int = MAX_PIXELS) -> Labelled:
    """What a config's own section says."""
    selects = {name: selection(getattr(section, name)) for name in ("train_select", "test_select")}
    named = {"image": section.image or "", "classes": tuple(section.classes)}
    shards = section.train_shards, section.test_shards
    return Labelled(*shards, section.label, None, value_range, max_pixels, **named, **selects)


def selection(section: SelectConfig | None) -> Selection | None:
    return Selection(**section.model_dump()) if section else None
