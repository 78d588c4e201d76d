"""What users change about a batch norm: classes of their own, parameters and buffers replaced, flags, numbers."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.libraries import LIBRARIES, Net, both, filled, images, plain, state, step, steps
from torch import Tensor, func, nn
from torch.nn.utils import stateless

import bn_ext

pytestmark = pytest.mark.usefixtures("device")


def scaled(parent: Any) -> Any:
    class Scaled(parent):
        def __init__(self, channels: int, scale: float = 2.0, **options: Any) -> None:
            super().__init__(channels, **options)
            self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

        def extra_repr(self) -> str:
            return super().extra_repr() + ", scaled"

    return Scaled(3, 3.0, momentum=0.2, dtype=torch.float64)


def with_own_forward(parent: Any) -> Any:
    class Own(parent):
        def forward(self, x: Tensor) -> Tensor:
            self._check_input_dim(x)
            statistics = (self.running_mean, self.running_var)
            return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)

    return Own(3, dtype=torch.float64)


def without_check(parent: Any) -> Any:
    class AnyRank(parent):
        def _check_input_dim(self, x: Tensor) -> None:
            assert x.dim() > 1

    module = AnyRank(3, dtype=torch.float64)
    module(images()[0].unsqueeze(0).flatten(2))
    return module


def with_own_loading(parent: Any) -> Any:
    class Doubled(parent):
        def _load_from_state_dict(self, values: Any, prefix: str, *args: Any) -> None:
            values[prefix + "weight"] = values[prefix + "weight"] * 2
            super()._load_from_state_dict(values, prefix, *args)

    module = Doubled(3, dtype=torch.float64)
    module.load_state_dict(plain("torch").state_dict())
    return module


@pytest.mark.parametrize("make", [scaled, with_own_forward, without_check, with_own_loading])
def test_subclasses(make: Callable[[Any], Any]) -> None:
    def run(library: str) -> Any:
        module = make(LIBRARIES[library].BatchNorm2d).to(images().device)
        if make is not with_own_loading:
            filled(module)
        twin = copy.deepcopy(module)
        assert type(twin) is type(module)
        return repr(module), steps(twin, images()), steps(module, images())

    assert both(lambda library: run(library)[1:]) is not None
    assert run("torch")[0] == run("bn_ext")[0]


def registered_again(m: Any) -> None:
    m.register_buffer("running_mean", torch.ones_like(m.running_mean))
    m.register_buffer("running_var", torch.full_like(m.running_var, 2.0), persistent=False)
    m.register_buffer("more", torch.ones(2))


def assigned(m: Any) -> None:
    m.running_mean = m.running_mean * 2
    m.weight.data = m.weight.data * 3
    m.bias = nn.Parameter(m.bias.detach() - 1)


def plain_tensors(m: Any) -> None:
    for name in ("weight", "running_var"):
        value = getattr(m, name).detach().clone() * 2
        delattr(m, name)
        setattr(m, name, value)


def reset(m: Any) -> None:
    m(images())
    m.reset_running_stats()
    m.reset_parameters()


def initialised(m: Any) -> None:
    m.apply(lambda t: nn.init.constant_(t.weight, 0.3) if isinstance(t, nn.BatchNorm2d) else None)


def frozen_weight(m: Any) -> None:
    m.weight.requires_grad_(False)


def unaffine(m: Any) -> None:
    m.weight = m.bias = None


def without_weight(m: Any) -> None:
    m.weight = None


def untracked(m: Any) -> None:
    m.track_running_stats = False
    m.running_mean = m.running_var = None


def views(m: Any) -> None:
    """Statistics that lie between others, as in one flat tensor of all buffers."""
    flat = torch.stack([m.running_mean, m.running_var, m.running_var + 1], 1)
    m.running_mean, m.running_var = flat[:, 0], flat[:, 1]


CHANGES = {
    f.__name__: f
    for f in (
        *(registered_again, assigned, plain_tensors, reset, initialised, frozen_weight, unaffine, without_weight),
        *(untracked, views),
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_in_place(change: str) -> None:
    def run(library: str) -> Any:
        module = plain(library)
        CHANGES[change](module)
        results = [steps(module, images()), steps(module, images())]
        names = [[name for name, _ in each] for each in (module.named_parameters(), module.named_buffers())]
        return results, [len(n) for n in names], [len(name) for n in names for name in n]

    both(run)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked", "weight"])
def test_deleted(name: str) -> None:
    told = []
    for library in LIBRARIES:
        module = plain(library)
        delattr(module, name)
        with pytest.raises(AttributeError) as error:
            module(images())
        told.append(str(error.value))
    assert told[0] == told[1]


NUMBERS: dict[str, dict[str, Any]] = {
    "momentum 1": {"momentum": 1},
    "momentum True": {"momentum": True},
    "momentum float64": {"momentum": np.float64(0.3)},
    "momentum float32": {"momentum": np.float32(0.3)},
    "momentum int64": {"momentum": np.int64(1)},
    "momentum tensor": {"momentum": torch.tensor(0.3)},
    "eps 1": {"eps": 1},
    "eps float32": {"eps": np.float32(0.01)},
    "eps tensor": {"eps": torch.tensor(0.01)},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_other_types(name: str) -> None:
    both(lambda library: steps(plain(library, **NUMBERS[name]), images()))


def test_momentum_that_changes_between_steps() -> None:
    def run(library: str) -> Any:
        module, results = plain(library), []
        for momentum in (0.5, None, 0.0, 0.1):
            module.momentum = momentum
            results.append(step(module, images()))
        return results

    both(run)


@pytest.mark.parametrize("momentum", ["0.1", [0.1]])
def test_momentum_of_no_number(momentum: Any) -> None:
    for library in LIBRARIES:
        module = plain(library, momentum=momentum)
        with pytest.raises(TypeError, match=f"'momentum'.* must be float, not {type(momentum).__name__}"):
            module(images())


def test_functional_calls_of_shared_parameters() -> None:
    def run(library: str) -> Any:
        model = nn.Sequential(plain(library), plain(library))
        model[1].weight = model[0].weight
        other = {"0.weight": torch.full_like(model[0].weight, 2.0)}
        results = [func.functional_call(model, other, (images(),), tie_weights=tied) for tied in (True, False)]
        mean = {"1.running_mean": torch.zeros_like(model[1].running_mean)}
        with pytest.warns(FutureWarning, match="deprecated"):
            results.append(stateless.functional_call(model, other | mean, (images(),)))
        return results, mean, state(model)

    both(run)


def test_attributes_and_names() -> None:
    stock, ours = Net("torch"), Net("bn_ext")
    for names in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(stock, names)()] == [n for n, _ in getattr(ours, names)()]
    assert set(dir(nn.BatchNorm2d(3))) <= set(dir(bn_ext.BatchNorm2d(3)))
    assert not [p for p in ours.requires_grad_(False).parameters() if p.requires_grad]


def test_training_flag_that_is_only_true() -> None:
    """torch.nn asks whether it is true."""

    def run(library: str) -> Any:
        results = []
        for flag in (1, np.bool_(True), torch.tensor(True), 0, None):
            module = plain(library)
            module.training = flag
            results.append(step(module, images()))
        return results

    both(run)


def test_property_in_the_place_of_a_parameter() -> None:
    """The class's, although the constructor has registered a parameter of that name too."""

    def run(library: str) -> Any:
        class Exponential(LIBRARIES[library].BatchNorm2d):
            def __init__(self) -> None:
                super().__init__(3, dtype=torch.float64, device=images().device)
                self.logarithm = nn.Parameter(torch.full_like(self.bias, 0.3))

            @property
            def weight(self) -> Tensor:
                return self.logarithm.exp()

            @weight.setter
            def weight(self, value: Tensor) -> None:
                """Not needed."""

        return steps(Exponential(), images())

    both(run)
