"""The one name under which everything here is imported: `prelude.data`, `prelude.pretrain`, …

The packages lie in the folders of the repository's root. An installed wheel has them inside this one; in a checkout,
installed or not, they are found from here, and the root itself never has to be on the import path, where folders called
`data` or `configs` would stand in the way of a user's own.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if not (Path(__file__).parent / "data").is_dir():
    __path__.append(str(_root))
