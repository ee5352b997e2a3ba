"""The recipes that are shipped: what each trains, takes and reaches.

    prelude recipes
    prelude recipes --objective vicreg
    prelude recipes mae_vit_small_96
    prelude recipes --json

With a name: its header, what it is built on, and all that it sets. A file of
yours is shown in the same way, and refused as training would refuse it.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import difflib
import shutil
import sys

from prelude.data.errors import UserError
from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import documented_parser, offering, parse, path
from prelude.launch.exit_codes import door
from prelude.launch.recipe_index import FINE_TUNING, Recipe, as_json, as_page, described, shipped
from prelude.objectives import OURS
from prelude.pretrain import recipe_yaml
from prelude.pretrain.recipes import read_recipe


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    refuse_ranks("recipes")
    if args.recipe:
        if args.objective or args.markdown:
            raise UserError("--objective and --markdown are of the whole list; leave out the name, or these.")
        recipe = described(args.recipe)
        print(as_json([recipe]) if args.json else _whole(recipe, args.recipe))
        return 0
    found = _of_objective(shipped(), args.objective)
    if args.json:
        print(as_json(found))
    elif args.markdown:
        print(as_page(found), end="")
    else:
        _print_table(found)
    return 0


def _of_objective(recipes: list[Recipe], objective: str | None) -> list[Recipe]:
    names = sorted({recipe.objective for recipe in recipes})
    if objective is not None and objective not in names:
        near = difflib.get_close_matches(objective, names, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(names)}."
        raise UserError(f"--objective {objective}: no recipe is of it; {hint}")
    return [recipe for recipe in recipes if objective in (None, recipe.objective)]


def _print_table(recipes: list[Recipe]) -> None:
    """A line for each; on a terminal as much of it as fits, since all of it is shown with the recipe's name."""
    titles = ("recipe", "objective", "pixels", "batch", "result", "takes")
    rows = [
        (one.name, one.objective, one.pixels, str(one.global_batch), one.result,
         "; ".join(filter(None, [one.takes.rstrip("."), one.speed])))
        for one in recipes
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in (titles, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(_begun("  ".join(cells).rstrip(), room))
    if room:
        print("\n`prelude recipes NAME` says all of one: what it trains, reaches and sets.")


def _begun(line: str, room: int | None) -> str:
    """As many whole words as there is room for, and a sign that there are more."""
    if room is None or len(line) <= room:
        return line
    return f"{line[: room - 1].rpartition(' ')[0].rstrip()} …"


def _whole(recipe: Recipe, named: str) -> str:
    lines = [f"trains   {recipe.trains}", f"takes    {recipe.takes}", f"reaches  {recipe.reaches}"]
    lines += [f"speed    {recipe.speed}"] if recipe.speed else []
    lines += [f"base     {', built on '.join(recipe.bases)}"] if recipe.bases else []
    return "\n".join([*lines, f"command  {recipe.command}", "", recipe_yaml.dump(read_recipe(named)).rstrip()])


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("recipe", nargs="?", type=path, metavar="NAME", help="one recipe, or a YAML file")
    objective = parser.add_argument("--objective", metavar="NAME", help=f"those of one objective, or {FINE_TUNING}")
    offering(objective, (*sorted(OURS), FINE_TUNING))
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for other tools")
    form.add_argument("--markdown", action="store_true", help="as the page docs/recipes.md")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
