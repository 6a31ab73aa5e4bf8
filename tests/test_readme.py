"""README is true: its Python blocks run as they stand, and its command lines compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate

from dst.cli.main import config_dir, register_schema
from dst.data import Digits
from dst.methods import __all__ as method_names
from dst.models import LeNet300100
from dst.models.classifier import Classifier

README = (Path(__file__).parent.parent / "README.md").read_text()
RUNNING = (Path(__file__).parent.parent / "docs" / "running.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README + RUNNING, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def names_for_the_blocks(tmp_path: Path) -> dict[str, object]:
    """What README's readers are assumed to have: a module, its data, a model and batches."""
    torch.manual_seed(0)
    model = LeNet300100((1, 8, 8), 10)
    module = Classifier(LeNet300100((1, 8, 8), 10), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))) for _ in range(5)]
    return {"module": module, "datamodule": Digits(root=tmp_path), "model": model, "batches": batches}


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), names_for_the_blocks(tmp_path))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python train.py" in c])
def test_command_lines_compose(command: str) -> None:
    words = shlex.split(command[command.index("python train.py") :])[2:]
    parsed = list(OverridesParser.create().parse_overrides([w for w in words if w != "-m"]))
    choices = [
        list(o.sweep_string_iterator()) if o.is_sweep_override() else [o.get_value_element_as_str()] for o in parsed
    ]
    assert parsed, command
    register_schema()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for i in range(max(map(len, choices))):
            overrides = [f"{o.key_or_group}={c[min(i, len(c) - 1)]}" for o, c in zip(parsed, choices, strict=True)]
            cfg = compose("train", [o for o in overrides if not o.startswith("hydra")])
            assert instantiate(cfg.sparsity, _convert_="all").density in (cfg.density, 1.0)


def test_every_method_is_in_the_table() -> None:
    for name in method_names:
        assert f"`dst.methods.{name}`" in README
        assert (Path(__file__).parent.parent / "docs" / "methods" / f"{name.rstrip('_')}.md").exists()


def test_set_up_is_two_commands() -> None:
    installs = [c for c in COMMANDS if c.startswith("pip install")]
    assert installs == [
        "pip install -c constraints.txt -e . && python train.py sparsity=rigl density=0.1",
        'pip install -c constraints.txt -e ".[dev]" && pytest',
    ]
