"""transformers' Trainer with bnbref's optimizers, where nothing answers to `import bitsandbytes`.

    Trainer(model, args, ..., optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(PagedAdamW8bit, args))

Under the alias `TrainingArguments(optim="paged_adamw_8bit")` and the other names of bitsandbytes' optimizers do the same.
"""

import inspect
from typing import Any

from torch import nn

from bnbref.optim import GlobalOptimManager, Optimizer

__all__ = ["embeddings_in_32_bits", "optimizer_cls_and_kwargs"]


def optimizer_cls_and_kwargs(
    optimizer: type[Optimizer], args: Any, **options: Any
) -> tuple[type[Optimizer], dict[str, Any]]:
    """An optimizer class and its arguments, for `Trainer(optimizer_cls_and_kwargs=...)`.

    args: the TrainingArguments. options: arguments of the optimizer, which override those of args.

    Of args are taken the learning rate and, if the optimizer has two betas and an epsilon, these. Weight decay is a setting of
    the groups, which Trainer makes; for Muon, whose groups are others, give Trainer an optimizer that is made. TypeError for a
    class that is not of `bnbref.optim`.

    >>> from types import SimpleNamespace
    >>> from bnbref.optim import PagedAdamW8bit
    >>> args = SimpleNamespace(learning_rate=2e-4, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8)
    >>> optimizer_cls_and_kwargs(PagedAdamW8bit, args)[1]
    {'lr': 0.0002, 'betas': (0.9, 0.95), 'eps': 1e-08}
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"optimizer must be a class of bnbref.optim, got {optimizer!r}")
    parameters = inspect.signature(optimizer.__init__).parameters
    found: dict[str, Any] = {"lr": args.learning_rate}
    betas = parameters.get("betas")
    if betas is not None and len(betas.default) == 2:
        found["betas"] = (args.adam_beta1, args.adam_beta2)
        for name in [name for name in ("adamw_eps", "eps") if name in parameters][:1]:
            found[name] = args.adam_epsilon
    return optimizer, {**found, **options}


def embeddings_in_32_bits(model: nn.Module) -> int:
    """Let the optimizer keep the state of embeddings in 32 bits, as Trainer does with bitsandbytes; how many there are.

    >>> embeddings_in_32_bits(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)))
    1
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in embeddings:
        GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return len(embeddings)
