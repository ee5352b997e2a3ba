"""Loads the packages that compute, one after another, and prints a line of JSON for each: what it is, or why it failed.

Run as a script, by its path, in a process of its own (`installed.Loading`); of ours it imports nothing, so that nothing
but these packages can be what is broken.
"""

import importlib
import json
import re
import sys
import warnings

PACKAGES = ("torch", "torchvision", "deepspeed")


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # deepspeed prints where it likes
    for name in PACKAGES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                module = importlib.import_module(name)
                about = devices(module) if name == "torch" else {}
            except Exception as error:  # whatever it is, it is what is asked for
                print(json.dumps({"name": name, "error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
                return
        told = [str(one.message).partition("\n")[0] for one in caught if "driver" in str(one.message).lower()]
        print(json.dumps({"name": name, "told": told, **about}), file=out, flush=True)


def devices(torch) -> dict:
    found = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            built = torch.version.hip is not None or has_kernels(about.major, about.minor, torch.cuda.get_arch_list())
            capability = f"{about.major}.{about.minor}"
            found.append({"name": about.name, "free": free, "total": total, "capability": capability, "built": built})
    names = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built_for = next((f"{name} {version}" for name, version in names.items() if version), None)
    return {"built_for": built_for, "devices": found}


def has_kernels(major: int, minor: int, built: list[str]) -> bool:
    """Kernels run on later devices of the same major number; what is in PTX is compiled for any later one."""
    for name in built:
        kind, _, number = name.partition("_")
        digits = re.match(r"\d+", number)[0]
        of = int(digits[:-1]), int(digits[-1])
        if of <= (major, minor) and (kind == "compute" or of[0] == major):
            return True
    return False


if __name__ == "__main__":
    main()
