"""`prelude`: one name for all the doors."""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import difflib
import importlib
import importlib.metadata
import sys
import tomllib
from pathlib import Path
from types import ModuleType

from prelude.data.errors import UserError
from prelude.launch import missing_package
from prelude.launch.exit_codes import door
from prelude.pretrain import stopping

COMMANDS = {
    "quickstart": ("quickstart", "pretrain, probe and export on a small data set made here"),
    "recipes": ("recipes", "what is shipped to train with, and what it takes"),
    "keys": ("keys", "what a config may set: each key, what it takes and means"),
    "pretrain": ("pretrain", "train an encoder on unlabelled shards"),
    "sweep": ("sweep", "pretrain with every combination of some settings"),
    "probe": ("linear_probe", "linear probe of a frozen encoder"),
    "knn": ("knn", "k-nearest-neighbour accuracy of a frozen encoder"),
    "finetune": ("finetune", "train an encoder on with labels, and test it"),
    "ncm": ("ncm", "nearest-class-mean accuracy of a frozen encoder"),
    "fewshot": ("fewshot", "accuracy of a frozen encoder with few labels"),
    "retrieve": ("retrieve", "whether the images nearest to one are of its class"),
    "segment": ("segment", "masks, by a frozen encoder's patches or maps"),
    "multilabel": ("multilabel", "several findings an image, by heads on a frozen encoder"),
    "svm": ("svm", "linear support vector machines on a frozen encoder"),
    "ood": ("ood", "images of other kinds than the classes, by a frozen encoder"),
    "anomaly": ("anomaly", "anomaly detection by a frozen encoder"),
    "defects": ("defects", "where images depart from normal ones, by a frozen encoder"),
    "shape": ("shape", "whether a frozen encoder minds its tiles in another order"),
    "bank": ("bank", "see or remove the frozen features that evaluations keep"),
    "embed": ("embed", "features of images as Parquet, NumPy or safetensors"),
    "neighbours": ("neighbours", "the images nearest to given ones by their features"),
    "maps": ("maps", "pictures of what an encoder takes for alike"),
    "compare": ("compare", "objectives or checkpoints side by side, as table and page"),
    "export": ("export", "write a run's encoder for timm, ONNX, torch or transformers"),
    "check-encoder": ("check_encoder", "which objectives an encoder can serve, timm's or your own"),
    "check-objective": ("check_objective", "whether your own objective keeps the contract"),
    "shards": ("shards", "make shards of images, and look at them"),
    "doctor": ("doctor", "what this machine offers, and what is wrong with it"),
}

USAGE = """usage: prelude COMMAND ...
       prelude --version
       prelude --completion bash|zsh

Self-supervised pretraining of image encoders from tar shards.

commands:
{commands}

`prelude COMMAND --help` says what a command takes. To train on several
devices or nodes, start the command's module with a launcher:

    deepspeed --num_gpus 8 --module prelude.launch.pretrain --config ..."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, COMMANDS))
    usage = USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()))
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if argv[0] == "--version":
        print(f"prelude {version()}")
        return 0
    if argv[0] == "--completion":
        from prelude.launch import completion

        print(completion.script(" ".join(argv[1:]), COMMANDS))
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}."
        raise UserError(f"prelude has no command {argv[0]!r}; {hint}")
    module = _imported(f"prelude.launch.{COMMANDS[argv[0]][0]}")
    sys.argv[0] = f"prelude {argv[0]}"  # the name that argparse shows in a command's own help
    return module.main(argv[1:])


def _imported(name: str) -> ModuleType:
    """Raises UserError where a package is missing that the command cannot begin without."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if told := missing_package.refusal(error, own_code=False):
            raise told from None
        raise


def version() -> str:
    """Of this checkout, or of the package that is installed."""
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text())["project"]["version"]
    return importlib.metadata.version("prelude-ssl")


def run() -> None:
    stopping.listen()
    raise SystemExit(door(main))


if __name__ == "__main__":
    run()
