"""The example of CONTRIBUTING.md runs as it is printed."""

from __future__ import annotations

import json
import re
import sys

import pytest

from tests.cli.test_command import ROOT, train_here  # noqa: F401 (a fixture)

GUIDE = ROOT / "CONTRIBUTING.md"


def test_a_users_method_is_one_file_and_one_yaml(tmp_path, monkeypatch, train_here):  # noqa: F811
    if not GUIDE.exists():
        pytest.skip("no checkout")
    section = GUIDE.read_text(encoding="utf-8").partition("## Adding a method")[2].partition("\n## ")[0]
    files = dict(re.findall(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", section, re.DOTALL))
    assert sorted(files) == ["my_conf/sparsity/sensitive.yaml", "my_methods.py"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = re.search(r"```bash\nPYTHONPATH=. python train.py (.*)\n```", section).group(1).split()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    quick = ["sparsity.update_every=10", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    done = train_here(tmp_path, *command, *quick)
    assert done.returncode == 0, done.stderr
    (summary,) = tmp_path.glob("outputs/*/*/summary.json")
    found = json.loads(summary.read_text())
    assert found["sparsity"] == "sensitive"
    assert found["topology"]["updates"] == 3
    assert found["density"]["realised"] == pytest.approx(0.2, abs=1e-4)
