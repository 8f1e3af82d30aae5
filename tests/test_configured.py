"""One configuration for a kernel: it is in effect for that compilation alone, and only for the reductions that it is for."""

import pickle
from types import SimpleNamespace

from bnbref.kernels.configured import configured, in_effect


def choices():
    """Inductor's."""
    from torch._inductor.virtualized import V

    return V.choices


def config_of(options, *, reduction=True, numel=256):
    """What Inductor would be told about a kernel with that many columns."""
    features = SimpleNamespace(is_reduction=lambda: reduction, reduction_numel=numel)
    with in_effect(options):
        told = choices().triton_kernel_kwargs(None, features, [], {"other": 1})
    assert told["other"] == 1
    return told.get("fixed_config") and told["fixed_config"].config


def test_it_is_in_effect_inside_and_not_after():
    blocks = {"XBLOCK": 1, "R0_BLOCK": 64, "num_warps": 2, "num_stages": 1}
    before = type(choices())
    assert config_of(configured(rows=1, warps=2, columns=64)) == blocks
    assert type(choices()) is before
    assert config_of({}) is None


def test_it_is_for_reductions_of_its_width():
    options = configured(rows=2, warps=2, width=256)
    assert config_of(options) == {"XBLOCK": 2, "num_warps": 2, "num_stages": 1}
    assert config_of(options, numel=2048) is None
    assert config_of(options, reduction=False) is None


def test_caches_on_disk_tell_configurations_apart():
    """Their keys are pickled options (torch 2.11), or what `uuid` says (2.13)."""
    several = [configured(rows=1, warps=1), configured(rows=1, warps=2), configured(rows=1, warps=2, columns=64)]
    assert len({pickle.dumps(options) for options in several}) == 3
    names = set()
    for options in several:
        with in_effect(options):
            names.add(choices().uuid())
    assert len(names) == 3
