"""Every YAML file under conf/ composes, instantiates, and agrees with the code it configures."""

from __future__ import annotations

import inspect
from itertools import zip_longest
from pathlib import Path

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_class, get_method, get_object, instantiate
from omegaconf import OmegaConf

import dst
import dst.models
from dst.cli.main import config_dir, register_schema
from dst.cli.objects import make
from dst.data import ImageDataModule, Text
from tests.sampling import rotated

CONF = config_dir()
METHODS = sorted(path.stem for path in (CONF / "sparsity").glob("*.yaml"))


# Groups of pieces, by a method that has them.
OWNERS = {
    "rigl": ["allocation", "fraction", "init", "drop", "grow", "pattern"],
    "granet": ["schedule"],
    "mest": ["surplus"],
    "dsr": ["amount", "redistribute"],
}


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture
def config():
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: compose("train", list(overrides))


def test_every_file_lies_in_a_group_that_a_test_reads():
    tested = {"sparsity", "model", "data", "optimizer", "scheduler", "trainer", "logger", "experiment", "hydra"}
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == tested
    pieces = {path.name for path in (CONF / "sparsity").iterdir() if path.is_dir()}
    assert pieces == {group for groups in OWNERS.values() for group in groups}
    assert {path.name for path in CONF.glob("*.yaml")} == {"train.yaml"}


def test_there_is_a_file_for_every_method():
    assert sorted(name.rstrip("_") for name in dst.methods.__all__) == METHODS


@pytest.mark.parametrize(("name", "experiment"), rotated(METHODS, ["", *options("experiment")]))
def test_sparsity_lists_every_setting_with_the_defaults_of_the_code_in_every_experiment(config, name, experiment):
    cfg = config(f"sparsity={name}", "density=0.3", *([f"experiment={experiment}"] if experiment else []))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    function = get_method(cfg.sparsity._target_)
    assert set(cfg.sparsity) - {"_target_"} == set(inspect.signature(function).parameters)
    assert instantiate(cfg.sparsity, _convert_="all") == function(0.3)
    assert function(0.3).name == name


def exchanges():
    """Every piece once, one of every group at a time; each alone where everything is wanted."""
    for owner, groups in OWNERS.items():
        for names in zip_longest(*(options(f"sparsity/{group}") for group in groups)):
            yield owner, {group: name for group, name in zip(groups, names, strict=True) if name}
    for owner, groups in OWNERS.items():
        for group in groups if len(groups) > 1 else []:
            for name in options(f"sparsity/{group}"):
                yield pytest.param(owner, {group: name}, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(("owner", "pieces"), list(exchanges()))
def test_a_methods_pieces_can_be_exchanged(config, owner, pieces, tmp_path):
    needed = {
        "file": [f"sparsity.init.path={tmp_path}/masks.pt"],
        "per_layer": ["sparsity.allocation.densities_by_name={*.hidden.*:0.1,*:0.5}"],
    }
    density = 0.5 if "transposable_nm" in pieces.values() else 0.2
    cfg = config(
        f"sparsity={owner}",
        f"density={density}",
        *(f"sparsity/{group}={name}" for group, name in pieces.items()),
        *(setting for name in pieces.values() for setting in needed.get(name, [])),
    )
    method = make(cfg.sparsity)
    for group, name in pieces.items():
        piece = getattr(method, group)
        assert type(piece) is get_class(cfg.sparsity[group]._target_)
        fields = set(inspect.signature(type(piece)).parameters)
        assert set(cfg.sparsity[group]) - {"_target_", "_convert_"} == fields
        if name == "per_layer":
            assert piece.densities_by_name == {"*.hidden.*": 0.1, "*": 0.5}


IMAGES = {"input_shape": (3, 32, 32), "num_classes": 7}
TEXT = {"vocab_size": 7, "context": 5}


@pytest.mark.parametrize("name", options("model"))
def test_model(config, name):
    cfg = config(f"model={name}").model
    parameters = inspect.signature(get_class(cfg._target_)).parameters
    is_text = "vocab_size" in parameters
    model = make(cfg, **(TEXT if is_text else IMAGES)).eval()
    if is_text:
        assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 7)
    else:
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    written = {key: value for key, value in cfg.items() if key not in ("_target_", "activation")}
    coded = {key: p.default for key, p in parameters.items() if key not in {*IMAGES, *TEXT, "activation"}}
    assert written == coded
    assert ("activation" in cfg) == ("activation" in parameters)


WITH_ACTIVATION = [n for n in options("model") if "activation" in (CONF / f"model/{n}.yaml").read_text()]


@pytest.mark.parametrize(("model", "name"), rotated(WITH_ACTIVATION, options("model/activation")))
def test_activation(config, model, name):
    cfg = config(f"model={model}", f"model/activation={name}").model
    activations = make(cfg, **IMAGES).activations
    factory = get_object(cfg.activation._target_)
    assert {type(activation) for activation in activations} == {type(factory(100))}
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    written = {key: value for key, value in cfg.activation.items() if key not in ("_target_", "_partial_")}
    assert written == {p.name: p.default for p in parameters}


def test_a_models_default_activation_is_that_of_the_code(config):
    for name in ("mlp", "convnet", "lenet_300_100"):
        assert config(f"model={name}").model.activation._target_ == "dst.nn.relu"
    assert all(isinstance(a, torch.nn.ReLU) for a in dst.models.MLP(**IMAGES).activations)


@pytest.mark.parametrize("name", [name for name in options("data") if name != "text"])
def test_data(config, name, tmp_path):
    cfg = config(f"data={name}", f"data.root={tmp_path}", "seed=3")
    datamodule = make(cfg.data)
    assert isinstance(datamodule, ImageDataModule)
    assert (datamodule.root, datamodule.seed) == (tmp_path, 3)
    assert set(cfg.data) - {"_target_"} == set(inspect.signature(ImageDataModule).parameters)


def test_text(config, tmp_path):
    cfg = config("data=text", f"data.path={tmp_path}/a.txt", "seed=3")
    datamodule = make(cfg.data)
    assert isinstance(datamodule, Text)
    assert (datamodule.path, datamodule.seed) == (tmp_path / "a.txt", 3)
    written = {key: value for key, value in config("data=text").data.items() if key != "_target_"}
    assert written == {key: p.default for key, p in inspect.signature(Text).parameters.items()}


def test_data_root_comes_from_the_environment(config, monkeypatch):
    assert config("data=mnist").data.root == "data"
    monkeypatch.setenv("DST_DATA_ROOT", "/somewhere")
    assert config("data=mnist").data.root == "/somewhere"


@pytest.mark.parametrize(("optimizer", "scheduler"), rotated(options("optimizer"), options("scheduler")))
def test_optimizer_and_scheduler(config, optimizer, scheduler):
    cfg = config(f"optimizer={optimizer}", f"scheduler={scheduler}", "optimizer.lr=0.5")
    weight = torch.nn.Parameter(torch.ones(3))
    built = make(cfg.optimizer)([weight])
    schedule_of = make(cfg.scheduler)
    rates = []
    schedule = schedule_of(built, 100) if schedule_of else None
    for _ in range(100):
        rates.append(built.param_groups[0]["lr"])
        weight.grad = torch.ones(3)
        built.step()
        if schedule:
            schedule.step()
    assert rates[0] == 0.5
    expected = {"constant": 0.5, "step": 0.005, "cosine": 0.5 * 0.000246720}[scheduler]
    assert rates[-1] == pytest.approx(expected, rel=1e-4)
    assert torch.isfinite(weight).all()


def test_trainer_lists_settings_that_exist(config, tmp_path):
    cfg = config()
    known = set(inspect.signature(lightning.Trainer).parameters)
    assert set(cfg.trainer) - {"_target_"} <= known
    trainer = make(cfg.trainer, callbacks=[], logger=[], default_root_dir=tmp_path)
    assert trainer.max_epochs == 50


@pytest.mark.parametrize("name", options("logger"))
def test_logger(config, name, tmp_path):
    cfg = config(f"logger={name}")
    if name == "csv":
        assert make(cfg.logger, save_dir=tmp_path) is None  # it is always there
    else:
        logger = make(cfg.logger, save_dir=tmp_path)
        assert Path(logger.save_dir) == tmp_path
    if name == "wandb":
        assert cfg.logger.offline is True


def test_lenet_mnist_holds_the_published_setting(config):
    cfg = config("experiment=lenet_mnist")
    assert cfg.model._target_ == "dst.models.LeNet300100"
    assert cfg.data._target_ == "dst.data.MNIST"
    assert (cfg.data.batch_size, cfg.data.validation, cfg.trainer.max_epochs) == (128, 0, 12)
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.1, 0.9, 1e-4)
    assert (cfg.sparsity.update_every, cfg.sparsity.fraction.initial, cfg.sparsity.stop) == (100, 0.3, 0.75)
    assert config("experiment=lenet_mnist", "data=fashion_mnist").data._target_ == "dst.data.FashionMNIST"


@pytest.mark.parametrize(
    "override", ["density=abc", "seed=0.5", "sparsity=rgil", "densty=0.1", "sparsity.updates=3", "exclude=3"]
)
def test_a_wrong_override_is_rejected_when_it_is_read(config, override):
    with pytest.raises(HydraException):
        config(override)
