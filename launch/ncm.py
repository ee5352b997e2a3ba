"""Nearest-class-mean accuracy of frozen encoders.

    prelude ncm runs/mae random:runs/mae pixels --train 'train-{0..9}.tar' --test test-0.tar

Several sources give one table; each result is also written as JSON. docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

from prelude.evaluators.ncm import ncm
from prelude.launch.exit_codes import door
from prelude.launch.frozen import door_parser, judge


def main(argv: list[str] | None = None) -> int:
    return judge(door_parser(__doc__).parse_args(argv), [ncm], "ncm", argv)


if __name__ == "__main__":
    raise SystemExit(door(main))
