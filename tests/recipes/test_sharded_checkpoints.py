"""Checkpoints in folders: read like files, replaced so that a kill leaves one."""

import contextlib
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from recipes import sharded_checkpoints
from recipes.checkpoints import last_checkpoint, read_checkpoint
from recipes.sharded_checkpoints import (
    FolderCheckpointIO,
    by_index,
    by_name,
    is_sharded,
    read_folder,
    replace_folder,
)


def named_state(module, groups):
    """Returns an optimizer's state by name, as FSDP2 writes it; its numbers tell the names."""
    return {
        "state": {
            name: {"exp_avg": torch.full_like(parameter, len(name)), "step": torch.tensor(3.0)}
            for name, parameter in module.named_parameters()
        },
        "param_groups": [{"params": list(names), "lr": 0.5} for names in groups],
    }


@pytest.fixture
def module():
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, bias=False))


@pytest.fixture
def folder(tmp_path, module):
    folder = tmp_path / "run/checkpoints/last.ckpt"
    state = named_state(module, [["0.weight", "1.weight"], ["0.bias"]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {"state_dict": module.state_dict(), "optimizer_0": state}
        dcp.save(content, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 7, "hyper_parameters": {"model_name": "x"}}, folder / "meta.pt")
    return folder


def test_a_folder_is_read_as_the_file_that_one_process_writes(folder, module):
    checkpoint = FolderCheckpointIO().load_checkpoint(folder)
    assert checkpoint["global_step"] == 7
    torch.testing.assert_close(checkpoint["state_dict"], dict(module.state_dict()))
    # Numbered by the groups: the bias, second in the model, comes last.
    (state,) = checkpoint["optimizer_states"]
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2]]
    assert state["state"][2]["exp_avg"].tolist() == [6, 6]
    optimizer = torch.optim.AdamW(
        [{"params": [module[0].weight, module[1].weight]}, {"params": [module[0].bias]}]
    )
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[module[0].bias]["step"] == 3


def test_names_and_numbers_are_each_others_reverse(module):
    named = named_state(module, [["0.weight", "1.weight"], ["0.bias"]])
    optimizer = torch.optim.AdamW(
        [{"params": [module[0].weight, module[1].weight]}, {"params": [module[0].bias]}]
    )
    assert by_name(by_index(named), optimizer, module) == named


def test_a_checkpoint_is_looked_into_without_reading_its_tensors(folder, module):
    checkpoint = read_checkpoint(folder)
    assert checkpoint["hyper_parameters"] == {"model_name": "x"}
    assert "optimizer_states" not in checkpoint
    for name, tensor in module.state_dict().items():
        found = checkpoint["state_dict"][name]
        assert (found.shape, found.dtype, found.device.type) == (tensor.shape, tensor.dtype, "meta")


def test_a_folder_that_is_not_complete_is_no_checkpoint(folder):
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"checkpoint .*last\.ckpt is damaged"):
        read_checkpoint(folder)
    (folder / "meta.pt").unlink()
    assert not is_sharded(folder)
    with pytest.raises(ValueError, match=r"complete folder of a sharded one, got .*last"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (None, r"\(a folder; __0_0\.distcp must have [\d,]+ bytes, got no such file\. Copy"),
        (1000, r"\(a folder; __0_0\.distcp must have [\d,]+ bytes, got 1,000 bytes\. Copy"),
    ],
)
def test_a_file_that_is_cut_is_damage_before_tensors_are_read(folder, size, message):
    file = folder / "__0_0.distcp"
    content = file.read_bytes()[:size]
    file.unlink()
    if size is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"last\.ckpt is damaged, .*{message}"):
        read_checkpoint(folder)


def test_the_command_line_makes_one_file(folder, tmp_path, capsys):
    file = tmp_path / "weights.ckpt"
    sharded_checkpoints.main([str(folder), str(file)])
    assert torch.load(file, weights_only=True)["global_step"] == 7
    for args, message in (
        ([str(folder), str(file)], "weights.ckpt exists"),
        ([str(tmp_path), str(tmp_path / "other.ckpt")], "no folder of a complete checkpoint"),
        ([str(folder), str(tmp_path / "none/other.ckpt")], "none/other.ckpt cannot be written"),
    ):
        assert message in refusal(capsys, args)
    (folder / "__0_0.distcp").write_bytes(b"")
    said = refusal(capsys, [str(folder), str(tmp_path / "other.ckpt")])
    assert "last.ckpt is damaged: __0_0.distcp must have" in said


def refusal(capsys, args):
    with pytest.raises(SystemExit) as stop:
        sharded_checkpoints.main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("killed_at", range(5))
def test_a_kill_at_any_time_leaves_a_checkpoint(folder, tmp_path, monkeypatch, killed_at):
    run, new = tmp_path / "run", folder.with_suffix(".new")
    new.mkdir()
    for file in folder.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    torch.save({"global_step": 8}, new / "meta.pt")
    calls = iter(range(100))

    def dying(function):
        def call(*args, **options):
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    path = type(folder)
    monkeypatch.setattr(path, "rename", dying(path.rename))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    with contextlib.suppress(KeyboardInterrupt):
        replace_folder(folder, new)
    found = last_checkpoint(run)
    assert read_folder(found)["global_step"] in (7, 8)
    monkeypatch.undo()
    # And the next save goes well, whatever lies about.
    new.mkdir(exist_ok=True)
    torch.save({"global_step": 9}, new / "meta.pt")
    replace_folder(folder, new)
    assert last_checkpoint(run) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "meta.pt")["global_step"] == 9
