"""Small models of the architectures that transformers can build from a config, and what quantizing and saving does to them.

    build("llama")                a model whose every number is random: the config is shrunk by rules, not by a list
    quantize(model, ...)          what must hold of it, quantized, saved and loaded, asserted; a cell of the table

python tests/architectures.py            writes the table of docs/content/architectures.md anew, for the names that are in it
python tests/architectures.py NAME       prints lines; --all: of each architecture of transformers, as far as it can be built
"""

import collections
import dataclasses
import inspect
import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import bnbref
from bnbref import BnbRefConfig, functional, int8, report

CONFIGS = {
    "nf4": BnbRefConfig("nf4", double_quant=False),
    "nf4 nested": BnbRefConfig("nf4"),
    "fp4": BnbRefConfig("fp4", double_quant=False),
    "int8": BnbRefConfig("int8"),
}

PAGE = Path(__file__).resolve().parent.parent / "docs" / "content" / "architectures.md"


def table() -> dict[str, str]:
    """The lines of the page, by architecture: every kind of model, and those that were read wrong once."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


# ---- small configs --------------------------------------------------------------------------------------------------

# Which model of an architecture: that of the first of these tasks that it has. Text alone comes last where there is more.
TASKS = (
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CTC",
)
TASKS += (
    "AUDIO_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "TEXT_TO_WAVEFORM",
    "SEQUENCE_CLASSIFICATION",
)

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")

# What an integer of a config is at most, by its name; None: it is an index into a vocabulary.
SIZES = {
    r".*vocab_size.*": 128,
    r".*(token|bos|eos|pad|sep|cls|mask|start|end)(_token)?_(id|index|idx)": None,
    r"num_(key_value|kv)_heads|n_head_kv|multi_query_group_num|num_key_value_groups": 2,
    r"mamba_(n|num)_heads|num_feat_extract_layers": 8,
    r".*(heads|n_head)": 4,
    r".*(head_dim|head_size|d_head|d_kv|rope_dim|rotary_dim|rank)": 16,
    r".*(num|n)_?.*(layers?|blocks?|repeats|stages)|.*_layers|n_layer|depth|.*_depth": 2,
    r".*(intermediate|ffn|ff|inner|mlp)_?(size|dim|hidden_size)?|d_ff|n_inner|.*ffn_dim|.*feedforward.*": 96,
    r"d_model|n_embd|dim|.*(embed_dim|hidden_size|hidden_dim|embedding_size|d_model|_dim|out_channels)": 64,
    r"(num|n)_.*(experts?)": 4,
    r".*(top_k|experts_per_tok.*|topk)": 2,
    r"image_size|img_size": 32,
    r".*patch_size": 8,
    r"max_.*positions?(_embeddings)?|n_positions|.*context_length|max_seq.*": 128,
}


def shrunk(config: Any) -> dict[str, Any]:
    """The fields of a config, its sizes small; of each kind of layer two."""
    fields = {key: value for key, value in config.to_dict().items() if value is not None}
    for key in ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names"):
        fields.pop(key, None)
    layers = next((fields[key] for key in DEPTHS if isinstance(fields.get(key), int)), 0)
    kinds = [fields[key] for key in fields if key.endswith("layer_types") or key == "layers_block_type"]
    picked = two_of_each(list(zip(*kinds, strict=False))) if kinds else list(range(min(layers, 2)))
    for key, value in fields.items():
        inner = getattr(config, key, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            fields[key] = shrunk(inner) | {"model_type": inner.model_type}
        elif isinstance(value, (list, tuple)):
            fields[key] = [small(key, value[k]) for k in (picked if len(value) == layers else range(len(value)))]
        else:
            fields[key] = len(picked) if key in DEPTHS and layers else small(key, value)
    if "expand" in fields and "num_heads" in fields:  # Mamba 2: heads times head_dim is the inner width
        fields["num_heads"] *= fields["expand"]
    return fields


def two_of_each(kinds: list[Any]) -> list[int]:
    """Where the first two of every kind are."""
    return sorted(k for kind in dict.fromkeys(kinds) for k in [k for k, other in enumerate(kinds) if other == kind][:2])


def small(key: str, value: Any) -> Any:
    """A value of a config."""
    if type(value) is not int:
        return value
    most = next((most for pattern, most in SIZES.items() if re.fullmatch(pattern, key)), value)
    return value % 128 if most is None else min(value, most)


def model_class(model_type: str) -> Any:
    """The class of an architecture that does most."""
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS]
    found = next(m[model_type] for m in (*mappings, modeling_auto.MODEL_MAPPING_NAMES) if model_type in m)
    return getattr(transformers, found if isinstance(found, str) else found[0])


def build(model_type: str) -> nn.Module:
    """A model with random numbers in every parameter and every buffer that is saved, so that none is as it was initialized."""
    kind, config = model_class(model_type), CONFIG_MAPPING[model_type]
    config = config(**shrunk(config()))
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(config).parameters())
    if count > 4_000_000:
        raise ValueError(f"{count:,} parameters: the rules do not make it small")
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.1 * torch.randn(p.shape) + (1 if p.dim() == 1 and re.search(r"(?i)norm.*weight$", name) else 0))
        for name, b in model.named_buffers():
            if name in model.state_dict() and b.is_floating_point():
                b.copy_(torch.rand(b.shape) + 0.5)
    return model


def inputs(model: Any) -> dict[str, Tensor]:
    """What to call a model with: text if it takes any, and what it cannot do without."""
    names, main = inspect.signature(model.forward).parameters, model.main_input_name
    ids, config = torch.arange(3, 11)[None], model.config
    torch.manual_seed(3)
    given = {name: ids for name in ("input_ids", "decoder_input_ids") if name in names}
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 32
        given[main] = torch.randn(
            1, getattr(vision, "num_channels", 3), *([size] * 2 if isinstance(size, int) else size)
        )
    if main == "input_features":
        given[main] = torch.randn(
            1, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 64)
        )
    if main == "input_values":
        given[main] = torch.randn(1, 800)
    return given


@torch.no_grad()
def outputs(model: Any) -> list[Tensor] | None:
    """Every float tensor that a model returns; None if it raises, for example because it takes more than `inputs`."""
    try:
        return tensors(dict(model(**inputs(model))))
    except Exception:
        return None


def repeatable(model: Any) -> bool:
    """Whether a model returns anything, and the same again."""
    once, again = outputs(model), outputs(model)
    return once is not None and again is not None and len(once) == len(again) and all(map(same, once, again))


def tensors(found: Any) -> list[Tensor]:
    """The float tensors of nested containers."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors(value)]


# ---- what must hold -------------------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(one, other)


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """All that a model holds: its state dict, and the buffers that are not saved."""
    return dict(model.named_buffers()) | model.state_dict()


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of what is not the same."""
    return sorted(a.keys() ^ b.keys()) + [key for key in a.keys() & b.keys() if not same(a[key], b[key])]


def expected(plain: nn.Module, names: set[str], config: BnbRefConfig) -> dict[str, Tensor]:
    """`numbers` of the model that `plain` becomes if the parameters of these names are quantized."""
    found = {}
    for key, value in numbers(plain).items():
        if key not in names:
            found[key] = value
            continue
        transposed = isinstance(plain.get_submodule(key.rpartition(".")[0]), transformers.pytorch_utils.Conv1D)
        weight = value.t().contiguous() if transposed else value
        if config.is_int8:
            found[key], found[f"{key.removesuffix('weight')}SCB"], _ = int8.quantize(weight)
            found[f"{key.removesuffix('weight')}weight_format"] = torch.zeros((), dtype=torch.uint8)
        else:
            found[key], state = functional.quantize_4bit(
                weight, quant_type=config.quant_type, compress_statistics=config.double_quant
            )
            found |= {f"{key}.{name}": part for name, part in state.as_dict(packed=True).items()}
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of a model in one format.

    outputs: "equal"; "not compared" if the float model gives none, or others each time; "none" if only the quantized one does.
    """

    quantized: int
    left: tuple[tuple[str, int], ...]
    outputs: str


def check(plain: Any, source: Path, config: BnbRefConfig, compare: bool) -> Row:
    """Quantize the model of a folder, save, load, save: nothing is lost, and nothing is as it was initialized.

    plain: the same model, not quantized. compare: the outputs, too.
    """
    kind, folder = type(plain), Path(tempfile.mkdtemp(dir=source.parent))
    torch.manual_seed(1)
    model = kind.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    found = report(model)
    names = {p.name for p in found.quantized}
    assert different(numbers(model), expected(plain, names, config)) == []

    model.save_pretrained(folder / "a")
    torch.manual_seed(2)
    again = kind.from_pretrained(folder / "a", dtype=torch.float32)
    assert different(numbers(again), numbers(model)) == []
    assert {p.name for p in report(again).quantized} == names
    again.save_pretrained(folder / "b")
    one, other = ({path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in "ab")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []

    compared = "not compared"
    if compare:
        before, after = outputs(model), outputs(again)
        compared = "none" if before is None else "equal"
        if before is not None:
            assert len(before) == len(after)
            assert all(map(same, before, after))
    left = collections.Counter(why(p.reason) for p in found.skipped if len(p.shape) > 1)
    return Row(len(names), tuple(sorted(left.items())), compared)


def why(reason: str) -> str:
    """A reason of the report in a few words."""
    if match := re.match(r".*parameter of (\w+), |(\w+), not an nn|(\w+) reads its weight", reason):
        return f"`{match[1] or match[2]}`" if match[3] is None else f"read by `{match[3]}`"
    return "tied" if reason.startswith(("to ", "tied to ")) else re.split(r"[:,]", reason)[0]


def rows(model_type: str, names: Any = tuple(CONFIGS)) -> dict[str, Row]:
    """`check` in each format."""
    with tempfile.TemporaryDirectory() as folder, bnbref.eager():
        source = Path(folder) / "plain"
        model = build(model_type)
        model.save_pretrained(source)
        plain = type(model).from_pretrained(source, dtype=torch.float32)
        lost = different(numbers(plain), numbers(model))
        if lost:
            raise ValueError(f"transformers alone loses {lost[0]}")
        compare = repeatable(plain)
        return {name: check(plain, source, CONFIGS[name], compare) for name in names}


# ---- the table ------------------------------------------------------------------------------------------------------


def line(model_type: str) -> str:
    """A row of the table."""
    found = rows(model_type)
    assert len({(row.quantized, row.left) for name, row in found.items() if name != "int8"}) == 1
    quantized = f"{found['nf4'].quantized}, {found['int8'].quantized}"
    left = ", ".join(f"{reason} {count}" for reason, count in found["nf4"].left)
    said = ", ".join(sorted({row.outputs for row in found.values()}))
    return f"| `{model_type}` | {model_class(model_type).__name__} | {quantized} | {left} | {said} |"


def main() -> None:
    """Writes the table, or prints the line of each architecture that can be built; on the other stream, why one cannot."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable()
    warnings.simplefilter("ignore")
    if not sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        for name, old in table().items():
            page = page.replace(old, line(name))
        PAGE.write_text(page, encoding="utf-8")
        return
    everything = [name for name in CONFIG_MAPPING if name in modeling_auto.MODEL_MAPPING_NAMES]
    for name in everything if sys.argv[1:] == ["--all"] else sys.argv[1:]:
        try:
            print(line(name), flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
