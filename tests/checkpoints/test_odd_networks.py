"""Networks of one's own with tied weights, shared buffers, masks of -inf: what is trained is opened and exported."""

import os
import subprocess
import sys

import odd_networks
import pytest
import torch
from runs import LAUNCHED

from prelude.checkpoints.convert.fit import fit
from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.sources import open_encoder, open_weights
from prelude.checkpoints.state.holders import named_tensors
from prelude.checkpoints.store import Store
from prelude.data.errors import UserError
from prelude.launch import check_encoder
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder

KINDS = ["tied", "shared_buffer", "masked", "expanded", "views"]


@pytest.fixture
def make_run(save_whole, tmp_path):
    def make(kind, odd=None):
        """The run's folder and its encoder, with a checkpoint of what an engine has of it."""
        config = EncoderConfig(name=f"odd_networks:{kind}", image_size=16)
        torch.manual_seed(3)
        model = getattr(odd_networks, kind)((16, 16))
        tensors = {f"encoder.{name}": tensor.detach().contiguous() for name, tensor in named_tensors(model)}
        meta = {"step": 1, "encoder": config.model_dump(mode="json"), "exported": "encoder."}
        meta |= {"mean": [0.5] * 3, "std": [0.5] * 3, "loader": {}, "config": {"objective": {"name": "rotation"}}}
        save_whole(Store(tmp_path / "run" / "checkpoints"), 1, meta=meta, encoder=tensors | (odd or {}))
        return str(tmp_path / "run"), model.eval()

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_opened_exported_and_opened_again(make_run, tmp_path, kind):
    run, model = make_run(kind)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        opened = open_encoder(run)
        assert opened.model(images).equal(expected)
        assert export_encoder(run, tmp_path / "export").max_difference == 0
        again = open_encoder(str(tmp_path / "export"))
    assert again.model(images).equal(expected) and again.fingerprint == opened.fingerprint
    fit(build_encoder(opened.config, seed=7), open_weights(run), "the encoder of another run")
    code = (tmp_path / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = f"import sys, torch\nimages = torch.load('images.pt')\n{code}\nassert 'prelude' not in sys.modules"
    torch.save(images, tmp_path / "export" / "images.pt")
    code += "\ntorch.save(features, 'features.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "export", env=os.environ | LAUNCHED, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "export" / "features.pt"), expected)


def test_numbers_that_the_network_does_not_have_are_still_damage(make_run):
    run, model = make_run("masked", {"encoder.a.bias": torch.full((8,), odd_networks.INFINITE)})
    with pytest.raises(UserError, match=r"not finite in a\.bias; fetch it again"):
        open_encoder(run)


def test_what_no_checkpoint_can_hold_is_refused_before_anything_is_trained():
    with pytest.raises(UserError, match="with _extra_state in its state_dict, .* persistent=False"):
        check_encoder.main(["odd_networks:with_more", "encoder.image_size=16"])
