"""How every door's help looks."""

import argparse


def documented_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a door's docstring: its first line above the arguments, the rest below, as written."""
    first, _, rest = doc.partition("\n\n")
    return argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
