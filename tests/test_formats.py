"""Checkpoints that are damaged, incomplete or of another layout: each is refused in one line that names the cause."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_head
from safetensors.torch import load_file, save_file

from hf_jetflow import JetFlowHead


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved head; a test spoils it."""
    tiny_head().save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, kind: type[Exception], **kwargs: Any) -> str:
    """The message with which a head is refused."""
    with pytest.raises(kind, match=re.escape(folder.name)) as caught:
        JetFlowHead.from_pretrained(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message.strip(), message
    return message


def test_a_missing_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("layers.1.mlp.up_proj.weight"))
    message = refusal(folder, ValueError)
    assert "1 missing (layers.1.mlp.up_proj.weight)" in message
    assert "Nothing was loaded" in message


def test_many_missing_tensors_are_counted_and_three_named(folder):
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0" in name])
    message = refusal(folder, ValueError)
    assert "11 missing (" in message
    assert message.count("layers.0") == 3


def test_an_unexpected_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update(markov_head=torch.zeros(2)))
    assert "1 unexpected (markov_head)" in refusal(folder, ValueError)


def test_a_layer_more_than_the_configuration_says_is_refused(folder):
    change_config(folder, num_hidden_layers=1, is_causal=True, layer_types=None)
    assert "11 unexpected (layers.1." in refusal(folder, ValueError)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    change_tensors(folder, lambda tensors: tensors.update({"fc.weight": torch.zeros(32, 96)}))
    assert "1 misshapen (fc.weight: (32, 96) in the file, (32, 64) by config.json)" in refusal(folder, ValueError)


def test_a_misshapen_tensor_is_refused_even_where_the_caller_would_ignore_it(folder):
    change_tensors(folder, lambda tensors: tensors.update({"fc.weight": torch.zeros(32, 96)}))
    assert "misshapen" in refusal(folder, ValueError, ignore_mismatched_sizes=True)


def test_a_missing_draft_vocabulary_is_named(folder):
    change_config(folder, draft_vocab_size=10)
    assert "1 missing (d2t)" in refusal(folder, ValueError)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_cut_off_safetensors_file_is_called_damaged(folder, kept):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    message = refusal(folder, OSError)
    assert "model.safetensors is damaged or cut off" in message
    assert "download or save the head again" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", 32.5),
        ("num_hidden_layers", None),
        ("hidden_state_indices", "2,4"),
        ("hidden_state_indices", [2.5, 4.0]),
        ("rope_parameters", "default"),
        ("rope_parameters", {"rope_type": "weird"}),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("is_causal", "yes"),
        ("layer_types", ["full_attention"]),
    ],
)
def test_a_field_of_the_wrong_type_is_named(folder, field, value):
    change_config(folder, **{field: value})
    message = refusal(folder, ValueError)
    assert "config.json" in message
    assert field in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 1),
        ("hidden_size", -1),
        ("head_dim", 0),
        ("num_key_value_heads", 0),
        ("hidden_act", "sillu"),
        ("layer_types", ["full_attention", "no_attention"]),
    ],
)
def test_a_field_out_of_range_is_named(folder, field, value):
    change_config(folder, **{field: value})
    assert f"`{field}`" in refusal(folder, ValueError)


@pytest.mark.parametrize("content", [b"", b'{"model_type": "jetflow"', b"<html>404</html>", b"\xff\xfe\x00binary"])
def test_a_config_that_is_not_json_is_called_so(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json is not valid JSON" in refusal(folder, OSError)


def test_a_config_that_is_json_but_no_object_is_called_so(folder):
    (folder / "config.json").write_text("[1, 2]")
    assert "config.json holds a list, but a JSON object is needed" in refusal(folder, ValueError)


def test_a_generation_config_that_is_not_json_is_called_so(folder):
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json" in refusal(folder, OSError)


def test_a_folder_without_weights_is_called_so(folder):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(folder, OSError)


def test_a_folder_without_config_is_called_so(folder):
    (folder / "config.json").unlink()
    assert "holds no config.json" in refusal(folder, OSError)


def test_an_empty_folder_is_called_so(tmp_path):
    assert "holds no config.json" in refusal(tmp_path, OSError)


def test_a_folder_that_does_not_exist_is_called_so(tmp_path):
    for path in (tmp_path / "nowhere", Path("examples/heads/nowhere")):  # a Hub id has one slash
        assert "is not a folder; give the folder or Hub id" in refusal(path, OSError)


def test_a_file_in_place_of_its_folder_is_called_so(folder):
    assert "is not a folder; give the folder or Hub id" in refusal(folder / "model.safetensors", OSError)


def test_an_unknown_hub_id_is_named(tmp_path):
    text = refusal(Path("org/nowhere"), OSError, cache_dir=tmp_path, local_files_only=True)
    assert text.startswith(f"there is no folder `org/nowhere` in {Path.cwd()}, and the Hub gives no such head (")
    assert text.endswith("); give the folder or Hub id of a saved head, or check connection and access")


def test_an_empty_subfolder_is_called_so(folder):
    assert "holds no config.json" in refusal(folder, OSError, subfolder="elsewhere")


def test_pickled_weights_are_never_read(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "model.safetensors" in refusal(folder, OSError)


def test_pickled_weights_are_not_read_on_request_either(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "model.safetensors" in refusal(folder, OSError, use_safetensors=False)


def test_pickled_weights_beside_safetensors_are_left_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    JetFlowHead.from_pretrained(folder)
