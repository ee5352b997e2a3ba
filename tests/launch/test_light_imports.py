"""What timm and DeepSpeed would import on the way, and no door uses."""

import subprocess
import sys

import pytest

IMPORTER = """
try:
    import {0} as found
except ImportError:
    found = None
"""


@pytest.mark.parametrize(("importer", "package"), [("timm", "wandb"), ("deepspeed", "mlflow")])
def test_neither_package_of_records_is_imported_unless_somebody_else_does(importer, package, tmp_path):
    (tmp_path / f"{importer}.py").write_text(IMPORTER.format(package))
    (tmp_path / "objective_of_mine.py").write_text(IMPORTER.format(package))
    (tmp_path / f"{package}.py").write_text("")
    lines = [
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})",
        f"import prelude.launch, {importer}, objective_of_mine",
    ]
    lines += [f"print({importer}.found, objective_of_mine.found is sys.modules[{package!r}])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "None True\n", done.stdout + done.stderr
