"""Pretrain, probe and export on a small data set that is made on the spot.

    prelude quickstart
    prelude quickstart --seed 1 --run-dir runs/second

Takes about three minutes on two cores and ends with a table: the pretrained
encoder, the same encoder untrained, and raw pixels. A quickstart that was
interrupted goes on where it stopped.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from prelude.launch import pretrain
from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import documented_parser, parse, path
from prelude.launch.exit_codes import door

NUM_TRAIN, NUM_TEST = 5000, 1000


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    refuse_ranks("quickstart")
    from prelude.checkpoints.export import export_encoder
    from prelude.checkpoints.store import recorded_config
    from prelude.data.errors import UserError
    from prelude.data.shapes import write_shards
    from prelude.evaluators.frozen.knn import knn
    from prelude.evaluators.frozen.linear_probe import linear_probe
    from prelude.evaluators.judging import evaluate, labelled_shards
    from prelude.evaluators.results import print_table
    from prelude.evaluators.table_text import print_plain

    console, run = Console(stderr=True, highlight=False), Path(args.run_dir)
    shards, recorded = run / "shapes", recorded_config(run)
    if recorded and not shards.is_dir():
        raise UserError(f"{run} holds a run that quickstart has not made; write --run-dir with another folder.")
    if (before := recorded.get("seed", args.seed)) != args.seed:
        raise UserError(f"{run} was made with --seed {before}; write that seed, or --run-dir with another folder.")
    console.print(
        f"[bold]1 of 4[/] making {NUM_TRAIN} + {NUM_TEST} images of shapes in {escape(str(shards))}", emoji=False
    )
    write_shards(shards, "train", NUM_TRAIN, seed=args.seed)
    write_shards(shards, "test", NUM_TEST, seed=args.seed)

    console.print("[bold]2 of 4[/] pretraining without labels")
    train, test = f"{shards}/train-*.tar", f"{shards}/test-*.tar"
    settings = [f"run_dir={run}", f"seed={args.seed}", f"data.shards={train}"]
    settings += [f"evaluate.train_shards={train}", f"evaluate.test_shards={test}"]
    code = pretrain.main(["--config", "quickstart", *settings])
    if code:
        return code

    console.print("[bold]3 of 4[/] probing the frozen encoder, the same one untrained, and raw pixels")
    sources = [str(run), f"random:{run}", "pixels"]
    results = evaluate(
        sources,
        [linear_probe, knn],
        labelled_shards(sources),
        seed=args.seed,
        command=f"prelude quickstart --seed {args.seed} --run-dir {run}",
    )
    console.print("[bold]4 of 4[/] exporting the encoder for plain timm")
    print(export_encoder(str(run), run / "export"))

    print_table(results)
    pictures = sorted((run / "pictures").glob("*.png"))
    print_plain(console, f"what it learned to fill in   {pictures[-1] if pictures else 'no picture was drawn'}")
    print_plain(console, f"what it says of each place   prelude segment {run} random:{run} pixels")
    print_plain(console, f"curves                       tensorboard --logdir {run / 'tensorboard'}")
    print_plain(console, f"all numbers                  {run / 'metrics.jsonl'}, {run / 'evaluations'}")
    print_plain(
        console, f"the encoder                  timm.create_model('local-dir:{run / 'export'}', pretrained=True)"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--run-dir", type=path, default="runs/quickstart", metavar="DIR", help="(default: runs/quickstart)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the images and the weights (default: 0)")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
