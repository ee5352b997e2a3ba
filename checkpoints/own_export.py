"""The export of an encoder that timm lacks: its weights, and the name of the function that builds it.

- `model.safetensors` holds the weights under the network's own names; `config.json` says which function, with which
  settings, and how pixels are normalised. Opening the folder needs the function on the import path, as the run did.
- Nothing is published unless the function, called anew, gives the same features with these weights.
"""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from prelude.checkpoints.sources import EXPORT_SECTION, OpenedEncoder
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, pooled_width
from prelude.pretrain.own_encoder import arguments, had_expanded


def own_config(encoder: OpenedEncoder) -> dict:
    """What a reader needs who has the function and none of our packages."""
    return {
        "function": encoder.config.name,
        "arguments": arguments(encoder.config),
        "num_features": pooled_width(encoder.model),
        "mean": list(encoder.mean),
        "std": list(encoder.std),
    }


def own_reloaded(folder: Path) -> nn.Module:
    """The network of an export's draft, built by its function and filled strictly."""
    settings = json.loads((folder / "config.json").read_text())[EXPORT_SECTION]
    model = build_encoder(EncoderConfig.model_validate(settings["encoder"]), seed=0)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def own_card(encoder: OpenedEncoder) -> str:
    """How to load it, as a part of README.md."""
    module, _, function = encoder.config.name.partition(":")
    height, width = encoder.config.size
    features = pooled_width(encoder.model)
    assigned, cast = (", assign=True", ".float()") if had_expanded(encoder.model) else ("", "")
    return f"""
timm has no such architecture, and does not open this folder. The function that builds it does, where `{module}` is on
the import path:

```python
import json
from {module} import {function.partition(".")[0]}
from safetensors.torch import load_file
encoder = {function}(**json.load(open("config.json"))["arguments"])
encoder.load_state_dict(load_file("model.safetensors"){assigned})
features = encoder{cast}.eval()(images)  # (B, {len(encoder.mean)}, {height}, {width}) to (B, {features})
```
"""
