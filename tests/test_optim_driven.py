"""An optimizer that is driven as strangers drive one: groups change, calls are refused, loads go into other orders and kinds.

hypothesis walks. Beside the optimizer, which has several parameters in groups, in memory or in files, each parameter has a twin
with an optimizer of its own, which does nothing but step: the same gradients, with the settings that the walk says its group has.
Parameters of one memory step in the order of the groups. After each operation both have the same bits; and what is refused leaves
parameters, states and settings as they were.
"""

import contextlib
import copy
import io
import math
import pickle
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import same_bits
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_optim_classes import MATRICES_ALONE, make
from torch import nn

from bnbref import optim
from bnbref.optim import update
from bnbref.optim.state_dict import WRAPPED

KINDS = {  # and the kinds whose optimizers load its states and go on with the same steps
    "AdamW8bit": ["AdamW32bit", "PagedAdamW8bit", "Adam8bit"], "AdamW32bit": ["AdamW8bit", "PagedAdamW"], "SGD8bit": ["SGD32bit"],
    "Lion8bit": ["Lion32bit"], "LAMB8bit": ["LAMB32bit"], "LARS8bit": ["LARS32bit"], "RMSprop8bit": ["RMSprop32bit"],
    "Adagrad8bit": ["Adagrad32bit"], "AdEMAMix8bit": ["AdEMAMix32bit"], "Muon8bit": ["Muon32bit"], "SOAP8bit": ["SOAP32bit"],
    "Adafactor8bit": ["Adafactor32bit"], "AdamWScheduleFree8bit": ["AdamWScheduleFree32bit"],
}  # fmt: skip
NOTHING_TO_REFUSE = object()

SHARED = (600, 500)
"""Two parameters that are parts of one vector, and have 300 elements in common."""

NUMBERS = {"lr": [1e-3, 0.1, 0.0], "weight_decay": [0.0, 0.1], "betas": [(0.5, 0.75), (0.0, 0.9)]}


def parameters(dtype):
    """Parameters as models have them: of one shape, transposed, empty, a single number, parts of one memory, a negative view."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    memory = numbers(800)
    tensors = [numbers(24, 32), numbers(24, 32), numbers(20, 30).mT, numbers(0, 5), numbers(), numbers(700)]
    tensors += [torch._neg_view(numbers(300)), memory[: SHARED[0]], memory[800 - SHARED[1] :]]
    return [nn.Parameter(x) for x in tensors]


def copied_state(state):
    return {key: x.clone() if isinstance(x, torch.Tensor) else copy.deepcopy(x) for key, x in state.items()}


def same_state(one, other):
    return one.keys() == other.keys() and all(
        same_bits(x, other[key]) if isinstance(x, torch.Tensor) else x == other[key] for key, x in one.items()
    )


class Driven(RuleBasedStateMachine):
    @initialize(
        missing=st.sets(st.integers(0, 8), max_size=3), kind=st.sampled_from([*KINDS]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        bits=st.sampled_from([None, 24, 32]), in_files=st.booleans(), data=st.data(),
    )  # fmt: skip
    def begin(self, missing, kind, dtype, bits, in_files, data):
        self.kind, self.bits, self.time = kind, bits if dtype != torch.float32 else None, 0
        self.folder = tempfile.TemporaryDirectory()
        self.in_files, self.files_are_of, self.overrides, self.release = in_files, None, {}, None
        self.params = parameters(dtype)
        self.twins = [(q, self.optimizer([{"params": [q], **self.rule_of(q)}])) for q in parameters(dtype)]
        self.plain = [{key: x for key, x in twin.param_groups[0].items() if key != "params"} for _, twin in self.twins]
        # Of each group its settings, and the numbers of its parameters.
        order = data.draw(st.permutations(range(len(self.params))))
        self.groups = []
        for i in order:
            own = self.rule_of(self.params[i])
            fits = [group for group in self.groups if group[0] == own and len(group[1]) < 3]
            fits[0][1].append(i) if fits else self.groups.append((own, [i]))
        for n, (own, _) in enumerate(self.groups):
            own["lr"] = 1e-2 * (n + 1)
        self.ours = self.new_optimizer()
        self.step(missing=missing, special="", joined=False, how="plain")

    # ---- what the walk is made of -----------------------------------------------------------------------------------

    def rule_of(self, p):
        """Settings of the group of a parameter without which its class does not take it."""
        return {"rule": "adamw"} if self.kind.startswith(MATRICES_ALONE) and p.dim() != 2 else {}

    def optimizer(self, groups, **options):
        options |= {"master_weight_bits": self.bits, "min_8bit_size": 256, "blocksize": 128}
        return make(self.kind, groups, **options)

    def new_optimizer(self):
        """An optimizer of all parameters in the groups that there are. It has the folder, if there is one."""
        groups = [{"params": [self.params[i] for i in members], **own} for own, members in self.groups]
        return self.optimizer(groups, **({"page_directory": self.folder.name} if self.in_files else {}))

    def in_order(self):
        return [i for _, members in self.groups for i in members]

    def whole(self):
        """Everything that an operation which is refused must leave as it was."""
        state = {
            key: x if not isinstance(x, dict) else copied_state(x) for key, x in self.ours.state.items() if x != {}
        }
        values = [{k: v for k, v in group.items() if k != "params"} for group in self.ours.param_groups]
        members = [[id(p) for p in group["params"]] for group in self.ours.param_groups]
        checkpoint = [path.read_text() for path in Path(self.folder.name).glob("steps.json")]
        return [p.detach().clone() for p in self.params], state, values, members, checkpoint

    def gradients(self, missing, special):
        """The next gradients, of both sides."""
        self.time += 1
        generator = torch.Generator().manual_seed(self.time)
        for i, p in enumerate(self.params):
            q, _ = self.twins[i]
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if special == "zero":
                grad.zero_()
            if special == "nan" and grad.numel():
                grad.view(-1)[0] = torch.nan
            absent = i in missing or not p.requires_grad or i not in self.in_order()
            p.grad, q.grad = (None, None) if absent else (grad.clone(), grad)

    def twins_step(self):
        for own, members in self.groups:
            for i in members:
                _, optimizer = self.twins[i]
                [group] = optimizer.param_groups
                group.update({**self.plain[i], **own})
                before = dict(group)
                group.update(self.overrides.get(i, {}))
                optimizer.step()
                group.update(before)

    def alone(self):
        """From now on no parameter shares memory with another, as after any copy of them."""
        for p in [*self.params, *(q for q, _ in self.twins)]:
            p.data = p.detach().clone()

    # ---- steps ------------------------------------------------------------------------------------------------------

    @rule(
        missing=st.sets(st.integers(0, 8), max_size=3), special=st.sampled_from(["", "", "zero", "nan"]), joined=st.booleans(),
        how=st.sampled_from(["plain", "closure", "released", "scaled", "inference"]),
    )  # fmt: skip
    def step(self, missing, special, joined, how):
        """joined: small parameters make their steps in one call of the kernel, as on a GPU; hooks that release gradients stay."""
        self.gradients(missing, special)
        ours = self.ours
        with mock.patch.dict(update._JOINED, {"cpu": 2**18 if joined else 0}):
            if how == "closure":
                given = [p.grad for p in self.params]

                def closure():
                    assert torch.is_grad_enabled()
                    for p, grad in zip(self.params, given, strict=True):
                        p.grad = grad
                    return "loss"

                ours.zero_grad()
                assert ours.step(closure) == "loss"
            elif how == "released":
                self.backward_that_steps(keep=joined)
            elif how == "scaled":
                self.scaled(special)
            else:
                with torch.inference_mode() if how == "inference" else contextlib.nullcontext():
                    ours.step()
        self.twins_step()
        self.files_are_of = self.in_order() if self.in_files else None

    def backward_that_steps(self, keep):
        """Gradients of matrices by a backward pass; those of vectors, of which two are one memory, are given to `step`. keep: the
        hooks stay, while groups and whatever else changes."""
        given = [(p, p.grad) for p in self.params if p.grad is not None]
        for p, _ in given:
            p.grad = None
        self.release = self.release or optim.GradientRelease(self.ours)
        if keep:
            self.groups.reverse()
            self.ours.param_groups.reverse()
        products = ((p * grad).sum() for p, grad in given if p.dim() == 2)
        sum(products, torch.zeros((), requires_grad=True)).backward()
        for p, grad in given:
            if p.dim() != 2:
                p.grad = grad
        self.ours.step()
        if not keep:
            self.end_release()

    def end_release(self):
        if self.release is not None:
            self.release.remove()
            self.release = None

    def scaled(self, special):
        """As a scaler does it that meets an infinite gradient first, and makes no step."""
        found = any(p.grad is not None and p.grad.numel() for p in self.params)
        if any(p.dtype == torch.float16 for p in self.params) or special == "nan" or not found:
            self.ours.step()
            return
        given = [p.grad for p in self.params]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (torch.inf, 4.0):
            scaler.scale(torch.zeros(1))
            for p, grad in zip(self.params, given, strict=True):
                p.grad = None if grad is None else grad.clone().fill_(torch.inf) if factor > 4 else grad * factor
            scaler.step(self.ours)
            scaler.update(4.0)

    # ---- groups and settings ----------------------------------------------------------------------------------------

    @rule(data=st.data())
    def change_a_setting(self, data):
        at = data.draw(st.integers(0, len(self.groups) - 1))
        name = data.draw(st.sampled_from([name for name in NUMBERS if name in self.ours.param_groups[at]]))
        value = data.draw(st.sampled_from(NUMBERS[name]))
        if name == "betas" and len(self.ours.param_groups[at][name]) == 3:
            value += (0.99,)
        if name == "betas" and "ScheduleFree" in self.kind:
            return  # whose averages do not see a change of them
        self.groups[at][0][name] = value
        as_tensor = name == "lr" and data.draw(st.booleans())
        self.ours.param_groups[at][name] = torch.tensor(value, dtype=torch.float64) if as_tensor else value

    @rule(data=st.data())
    def groups_in_another_order(self, data):
        order = data.draw(st.permutations(range(len(self.groups))))
        self.groups[:] = [self.groups[i] for i in order]
        self.ours.param_groups[:] = [self.ours.param_groups[i] for i in order]

    @rule(data=st.data())
    def another_group_for_a_parameter(self, data):
        """As users do it by hand. A group that is empty then goes."""
        at = data.draw(st.integers(0, len(self.groups) - 1))
        own, members = self.groups[at]
        i = data.draw(st.sampled_from(members))
        to = [other for other in self.groups if other[0].get("rule") == own.get("rule")]
        to = data.draw(st.sampled_from([*to, None]))
        before = {key: x for key, x in self.ours.param_groups[at].items() if key != "params"}
        if to is None or to[1] == [i]:
            self.take_out(at, i)
            new = {**own, "lr": 2e-2, "weight_decay": 0.0}
            self.groups.append((new, [i]))
            self.ours.add_param_group({"params": self.params[i], **before, **new})
        else:
            self.take_out(at, i)
            place = next(j for j, other in enumerate(self.groups) if other is to)
            to[1].append(i)
            self.ours.param_groups[place]["params"].append(self.params[i])

    def take_out(self, at, i):
        """Takes a parameter out of its group, and the group away if it is empty then."""
        self.groups[at][1].remove(i)
        group = self.ours.param_groups[at]
        group["params"] = [p for p in group["params"] if p is not self.params[i]]
        if not group["params"]:
            del self.groups[at], self.ours.param_groups[at]

    @rule(data=st.data(), time=st.booleans())
    def step_without_a_parameter(self, data, time):
        """It is in no group for a step, and comes back in a group of its own."""
        at = data.draw(st.integers(0, len(self.groups) - 1))
        own, members = self.groups[at]
        i = data.draw(st.sampled_from(members))
        before = {key: x for key, x in self.ours.param_groups[at].items() if key != "params"}
        self.take_out(at, i)
        if time:
            self.step(missing=set(), special="", joined=False, how="plain")
        self.groups.append((dict(own), [i]))
        self.ours.add_param_group({"params": self.params[i], **before})

    @rule(i=st.integers(0, 8), how=st.sampled_from(["plain", "released"]))
    def step_with_an_override(self, i, how):
        """For a step a parameter has another learning rate than its group."""
        manager = optim.GlobalOptimManager.get_instance()
        manager.override_config(self.params[i], "lr", 0.03)
        self.overrides = {i: {"lr": 0.03}}
        try:
            self.step(missing=set(), special="", joined=False, how=how)
        finally:
            manager.initialize()
            self.overrides = {}

    @rule(i=st.integers(0, 8))
    def begin_anew(self, i):
        self.ours.state.pop(self.params[i], None)
        self.files_are_of = None  # they have it until the next step
        q, twin = self.twins[i]
        twin.state.pop(q, None)

    @rule(i=st.integers(0, 8))
    def freeze_or_thaw(self, i):
        p = self.params[i]
        p.requires_grad_(not p.requires_grad)

    @precondition(lambda self: "ScheduleFree" in self.kind)
    @rule(inference=st.booleans())
    def evaluate(self, inference):
        with torch.inference_mode() if inference else contextlib.nullcontext():
            self.ours.eval()
        self.ours.train()
        twins = [self.twins[i][1] for i in self.in_order()]
        for twin in twins:
            twin.eval()
        for twin in twins:
            twin.train()

    # ---- files, copies and casts ------------------------------------------------------------------------------------

    @rule(how=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def copied(self, how):
        """The old one goes, with its lock of the folder."""
        self.end_release()
        self.params, self.ours = how((self.params, self.ours))
        self.files_are_of = None
        self.alone()

    @rule(
        how=st.sampled_from(["as it is", "file", "wrapped", "inference"]), order=st.randoms(use_true_random=False),
        to_files=st.booleans(), kind=st.none() | st.randoms(use_true_random=False),
    )  # fmt: skip
    def resumed(self, how, order, to_files, kind):
        saved = self.ours.state_dict()
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        if kind is not None:
            self.another_kind(kind.choice(KINDS.get(self.kind, [self.kind])))
        self.go_on_elsewhere(saved, order, to_files, how)

    @precondition(lambda self: self.in_files and self.files_are_of == self.in_order())
    @rule(order=st.randoms(use_true_random=False), to_files=st.booleans())
    def resumed_from_pages(self, order, to_files):
        self.go_on_elsewhere({**self.ours.state_dict(), "state": optim.read_pages(self.folder.name)}, order, to_files)

    def go_on_elsewhere(self, saved, order, to_files, how="as it is"):
        """Into an optimizer that is made anew, of groups in another order, in the same folder or in memory."""
        self.end_release()
        before, names = self.in_order(), [*range(len(self.groups))]
        order.shuffle(names)
        self.groups[:] = [self.groups[j] for j in names]
        index = {i: n for n, i in enumerate(self.in_order())}
        groups = [saved["param_groups"][j] for j in names]
        saved["state"] = {index[before[n]] if isinstance(n, int) else n: x for n, x in saved["state"].items()}
        saved["param_groups"] = [{**group, "params": [index[before[n]] for n in group["params"]]} for group in groups]
        self.in_files, self.files_are_of = to_files, None
        self.ours = None  # which has the folder
        self.ours = self.new_optimizer()
        if how == "wrapped":
            handle = self.ours.register_load_state_dict_pre_hook(lambda _, given: given["optimizer"])
            self.ours.load_state_dict({"optimizer": saved, "epoch": 3})
            handle.remove()
        else:
            with torch.inference_mode() if how == "inference" else contextlib.nullcontext():
                self.ours.load_state_dict(saved)

    def another_kind(self, kind):
        self.kind = kind
        for i, (q, old) in enumerate(self.twins):
            new = self.optimizer([{"params": [q], **self.rule_of(q)}])
            new.load_state_dict(old.state_dict())
            self.twins[i] = q, new

    @rule(how=st.sampled_from(["clone", "transposed", "contiguous"]))
    def in_other_memory(self, how):
        self.alone()
        for p in self.params:
            p.data = p.detach().mT.contiguous().mT if how == "transposed" and p.dim() == 2 else p.detach().clone()
            if how == "contiguous":
                p.data = p.detach().contiguous()

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def cast(self, dtype):
        """As `model.to(dtype)` does it. With a correction, what a parameter stands for is read before and set after."""
        self.alone()
        twins = [(q, optimizer) for q, optimizer in self.twins]
        for p, optimizer in [*((p, self.ours) for i, p in enumerate(self.params) if i in self.in_order()), *twins]:
            value, begun = optimizer.exact_weight(p), "step" in optimizer.state.get(p, {})
            p.grad = None
            p.data = p.detach().to(dtype)
            if begun:
                optimizer.set_exact_weight(p, value)

    @rule(value=st.sampled_from([3, {"of": "mine"}, [1.5]]))
    def keep_something(self, value):
        """Under a key that is no parameter's."""
        self.ours.state["kept by others"] = value

    # ---- what is refused --------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def be_refused(self, data):
        self.gradients(set(), "")
        name = data.draw(st.sampled_from(sorted(x for x in dir(self) if x.startswith("refused_"))))
        before = self.whole()
        try:
            found = getattr(self, name)(data)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            found = error
        assert found is NOTHING_TO_REFUSE or isinstance(found, Exception), name
        params, state, values, members, checkpoint = before
        after = self.whole()
        assert all(same_bits(x.resolve_neg(), y.resolve_neg()) for x, y in zip(after[0], params, strict=True)), name
        assert after[1].keys() == state.keys(), name
        for key, x in state.items():
            assert same_state(x, after[1][key]) if isinstance(x, dict) else x == after[1][key], name
        assert (after[2], after[3], after[4]) == (values, members, checkpoint), name

    @contextlib.contextmanager
    def setting(self, at, name, value):
        group = self.ours.param_groups[at]
        before = dict(group)
        group[name] = value
        try:
            yield
        finally:
            group.clear()
            group.update(before)

    def some(self, data):
        """A parameter that will make a step, if there is one."""
        ready = [i for i in self.in_order() if self.params[i].grad is not None]
        return data.draw(st.sampled_from(ready)) if ready else None

    def refused_setting(self, data):
        at = data.draw(st.integers(0, len(self.groups) - 1))
        name, value = data.draw(
            st.sampled_from([("lr", -1.0), ("lr", math.nan), ("weight_decay", "0.1"), ("optim_bits", 16), ("maximize", "no"),
                             ("blocksize", 0), ("capturable", True), ("stochastic_rounding", 1), ("lr", torch.ones(2))])
        )  # fmt: skip
        with self.setting(at, name, value):
            if all(p.grad is None for p in self.ours.param_groups[at]["params"]):
                return NOTHING_TO_REFUSE
            self.ours.step()

    def refused_gradient(self, data):
        i = self.some(data)
        if i is None or self.params[i].numel() == 0:
            return NOTHING_TO_REFUSE
        self.params[i].grad = self.params[i].grad.to_sparse()
        self.ours.step()

    def refused_memory(self, data):
        """A gradient that is memory of another parameter."""
        i = self.some(data)
        others = [
            p for p in self.params if i is not None and p.shape == self.params[i].shape and p is not self.params[i]
        ]
        if i is None or not others or others[0].grad is None or others[0].numel() < 2:
            return NOTHING_TO_REFUSE
        self.params[i].grad = others[0].detach()
        self.ours.step()

    def refused_closure(self, data):
        self.ours.step(lambda: _raise(ValueError("of the closure")))

    def refused_hook(self, data):
        handle = self.ours.register_step_pre_hook(lambda *_: _raise(ValueError("of the hook")))
        try:
            self.ours.step()
        finally:
            handle.remove()

    def refused_load(self, data):
        saved = copy.deepcopy(self.ours.state_dict())
        for i, state in saved["state"].items():  # what is taken before the refusal must be gone after it
            if isinstance(i, int) and WRAPPED in state:
                for key, x in state[WRAPPED].items():
                    if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and "qmap" not in key:
                        x.mul_(0.5)
        for group in saved["param_groups"]:
            group["lr"] = 0.77
        what = data.draw(st.sampled_from(["groups", "size", "lost", "setting", "state", "step", "type"]))
        begun = [i for i, state in saved["state"].items() if isinstance(i, int) and "step" in state]
        if what == "groups":
            saved["param_groups"].append({"params": []})
        elif what == "size":
            saved["param_groups"][-1]["params"].append(99)
        elif what == "lost":
            saved["state"][77] = {}
        elif what == "setting":
            saved["param_groups"][-1]["lr"] = -0.5
        elif what == "type" or not begun:
            saved["state"][0] = None
        elif what == "step":
            del saved["state"][begun[-1]]["step"]
            if WRAPPED not in saved["state"][begun[-1]]:
                return NOTHING_TO_REFUSE
        else:
            wrapped = saved["state"][begun[-1]].get(WRAPPED) or {}
            keys = [key for key, x in wrapped.items() if key != "unorm_vec"]
            if not keys:
                return NOTHING_TO_REFUSE
            key = data.draw(st.sampled_from(keys))
            wrapped[key] = torch.zeros(13)
        self.ours.load_state_dict(saved)

    def refused_group(self, data):
        p = self.params[self.in_order()[0]]
        bad = data.draw(
            st.sampled_from([[p], torch.ones(3, requires_grad=True) * 2, 5, nn.Parameter(torch.ones(1).expand(40)), []])
        )
        given = {"params": [nn.Parameter(torch.ones(2)), *bad] if isinstance(bad, list) else bad}
        self.ours.add_param_group({**given, **({"weight_decay": -1} if bad == [] else {})})

    def refused_release(self, data):
        if all(p.grad is None for group in self.ours.param_groups for p in group["params"]):
            return NOTHING_TO_REFUSE
        optim.GradientRelease(self.ours)

    def refused_value(self, data):
        p = self.params[self.in_order()[0]]
        self.ours.set_exact_weight(p, torch.ones(7))

    def refused_folder(self, data):
        if self.files_are_of is None:
            return NOTHING_TO_REFUSE
        q = nn.Parameter(torch.ones(3))
        q.grad = torch.ones(3)
        optim.AdamW([q], page_directory=self.folder.name).step()

    def refused_override(self, data):
        i = self.some(data)
        if i is None:
            return NOTHING_TO_REFUSE
        manager = optim.GlobalOptimManager.get_instance()
        manager.override_config(self.params[i], "learning_rate", 0.1)
        try:
            self.ours.step()
        finally:
            manager.initialize()

    # ---- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def the_same_bits(self):
        if not hasattr(self, "ours"):
            return
        for i, (p, (q, twin)) in enumerate(zip(self.params, self.twins, strict=True)):
            assert same_bits(p.detach().resolve_neg(), q.detach().resolve_neg()), i
            here, there = self.ours.state.get(p, {}), twin.state.get(q, {})
            assert same_state(copied_state(here), there), (i, here.keys(), there.keys())

    def teardown(self):
        if hasattr(self, "folder"):
            self.ours = None
            self.folder.cleanup()


def _raise(error):
    raise error


@pytest.fixture
def one_thread():
    """A kernel of some hundred elements takes milliseconds where threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("eager", "one_thread")
@pytest.mark.filterwarnings("ignore:paged state")
@pytest.mark.parametrize("examples", [10, pytest.param(400, marks=pytest.mark.slow)])
def test_driven(examples):
    own = settings(max_examples=examples, stateful_step_count=10, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Driven, settings=own)
