"""8-bit, paged and compiled optimizers under bitsandbytes' names: each rule is an equation, everything else is derived."""

# isort: off
from bnbref.optim.coupled_families import (
    SGD, SGD8bit, SGD32bit, PagedSGD, PagedSGD8bit, PagedSGD32bit,
    LARS, LARS8bit, LARS32bit, PagedLARS, PagedLARS8bit, PagedLARS32bit,
    RMSprop, RMSprop8bit, RMSprop32bit, PagedRMSprop, PagedRMSprop8bit, PagedRMSprop32bit,
    Adagrad, Adagrad8bit, Adagrad32bit, PagedAdagrad, PagedAdagrad8bit, PagedAdagrad32bit,
)  # fmt: skip
from bnbref.optim.families import (
    Adam, Adam8bit, Adam32bit, PagedAdam, PagedAdam8bit, PagedAdam32bit,
    AdamW, AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit,
    LAMB, LAMB8bit, LAMB32bit, PagedLAMB, PagedLAMB8bit, PagedLAMB32bit,
    Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit,
    AdEMAMix, AdEMAMix8bit, AdEMAMix32bit, PagedAdEMAMix, PagedAdEMAMix8bit, PagedAdEMAMix32bit,
)  # fmt: skip

from bnbref.optim.schedule_free import (
    AdamWScheduleFree, AdamWScheduleFree8bit, AdamWScheduleFree32bit, PagedAdamWScheduleFree, PagedAdamWScheduleFree8bit,
    PagedAdamWScheduleFree32bit,
)  # fmt: skip
from bnbref.optim.matrix_families import (
    Muon, Muon8bit, Muon32bit, PagedMuon, PagedMuon8bit, PagedMuon32bit,
    Adafactor, Adafactor8bit, Adafactor32bit, PagedAdafactor, PagedAdafactor8bit, PagedAdafactor32bit,
    SOAP, SOAP8bit, SOAP32bit, PagedSOAP, PagedSOAP8bit, PagedSOAP32bit,
    muon_groups,
)  # fmt: skip

# isort: on
from bnbref.optim.gradient_release import GradientRelease
from bnbref.optim.optimizer import Optimizer
from bnbref.optim.page_directory import read_pages
from bnbref.optim.rules import Rule, State
from bnbref.optim.settings import GlobalOptimManager

__all__ = [  # noqa: RUF022
    "SGD", "SGD8bit", "SGD32bit", "PagedSGD", "PagedSGD8bit", "PagedSGD32bit",
    "LARS", "LARS8bit", "LARS32bit", "PagedLARS", "PagedLARS8bit", "PagedLARS32bit",
    "Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit",
    "AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit",
    "LAMB", "LAMB8bit", "LAMB32bit", "PagedLAMB", "PagedLAMB8bit", "PagedLAMB32bit",
    "Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit",
    "RMSprop", "RMSprop8bit", "RMSprop32bit", "PagedRMSprop", "PagedRMSprop8bit", "PagedRMSprop32bit",
    "Adagrad", "Adagrad8bit", "Adagrad32bit", "PagedAdagrad", "PagedAdagrad8bit", "PagedAdagrad32bit",
    "AdEMAMix", "AdEMAMix8bit", "AdEMAMix32bit", "PagedAdEMAMix", "PagedAdEMAMix8bit", "PagedAdEMAMix32bit",
    "AdamWScheduleFree", "AdamWScheduleFree8bit", "AdamWScheduleFree32bit",
    "PagedAdamWScheduleFree", "PagedAdamWScheduleFree8bit", "PagedAdamWScheduleFree32bit",
    "Muon", "Muon8bit", "Muon32bit", "PagedMuon", "PagedMuon8bit", "PagedMuon32bit",
    "Adafactor", "Adafactor8bit", "Adafactor32bit", "PagedAdafactor", "PagedAdafactor8bit", "PagedAdafactor32bit",
    "SOAP", "SOAP8bit", "SOAP32bit", "PagedSOAP", "PagedSOAP8bit", "PagedSOAP32bit",
    "GlobalOptimManager", "GradientRelease", "Optimizer", "Rule", "State", "muon_groups", "read_pages",
]  # fmt: skip
