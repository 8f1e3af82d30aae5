"""A model of transformers without memory, made from its config: the shapes that a plan counts (`bnbref.integrations.hf.plan`).

The model is on the meta device. There it is quantized as `from_pretrained` would, and run, so that its keys and values are those
that its own code keeps, whatever kind of attention or state that is.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto

from bnbref.integrations.hf.config import BnbRefConfig
from bnbref.integrations.hf.layers import features, is_linear
from bnbref.integrations.hf.quantizer import BnbRefHfQuantizer
from bnbref.nn.quantized_layer import QuantizedLayer

DTYPE = torch.bfloat16

FORMATS: dict[str, BnbRefConfig | None] = {
    "bfloat16": None,
    "int8": BnbRefConfig("int8"),
    "nf4": BnbRefConfig("nf4", double_quant=False),
    "nf4, double": BnbRefConfig("nf4"),
}
"""From the most exact to the smallest."""

_TASKS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")


class Weights(NamedTuple):
    """What a model consists of: the number of elements that stay float; the bytes of codes, and of scales."""

    floats: int
    codes: int
    scales: int


class Blueprint:
    """The model of a config, without memory. ValueError if transformers has none.

    >>> from transformers import LlamaConfig
    >>> tiny = LlamaConfig(
    ...     vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ... )
    >>> Blueprint(tiny).weights("nf4")
    Weights(floats=13120, codes=40960, scales=5120)
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._class = _model_class(config)
        self.model = self._built()
        self._weights: dict[str, Weights] = {}

    @property
    def loader(self) -> str:
        """The class of transformers whose `from_pretrained` loads the model."""
        causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        known = type(self.config) in causal and causal[type(self.config)] is self._class
        return "AutoModelForCausalLM" if known else str(self._class.__name__)

    def _built(self) -> Any:
        try:
            with torch.device("meta"):
                model = self._class._from_config(self.config, dtype=DTYPE)
        except Exception as error:  # a stranger's code, which may need other packages, or a setting that is not there
            raise ValueError(
                f"transformers cannot make a {self._class.__name__} of this config: {type(error).__name__}: {error}"
            ) from error
        return model.eval()

    def weights(self, format_name: str) -> Weights:
        """The weights in one of `FORMATS`."""
        if format_name not in self._weights:
            spec = FORMATS[format_name]
            self._weights[format_name] = (
                Weights(sum(p.numel() for p in self.model.parameters()), 0, 0)
                if spec is None
                else self._quantized(spec)
            )
        return self._weights[format_name]

    def _quantized(self, spec: BnbRefConfig) -> Weights:
        quantizer = BnbRefHfQuantizer(spec)
        quantizer.pre_quantized = False
        model = quantizer._process_model_before_weight_loading(self._built())
        layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
        floats = codes = scales = 0
        for name, p in model.named_parameters():
            if name in layers or name in quantizer.fused:
                rows = int(getattr(layers.get(name), "out_features", p.shape[0]))
                own = spec.bytes_of(rows, p.numel() // rows)
                codes, scales = codes + own[0], scales + own[1]
            else:
                floats += p.numel()
        return Weights(floats, codes, scales)

    def undivided_bytes(self) -> int:
        """Bytes of the largest part that one GPU holds as a whole, in bfloat16: a layer, or the embedding."""
        names = self.model._no_split_modules or ()
        parts = [m for m in self.model.modules() if type(m).__name__ in names or isinstance(m, torch.nn.Embedding)]
        sizes: list[int] = [sum(p.numel() for p in part.parameters()) for part in parts or [self.model]]
        return max(sizes) * DTYPE.itemsize

    def adapter_shapes(self, rank: int) -> list[torch.Size]:
        """The shapes of the adapters that LoRA of that rank puts on all linear layers, which peft calls "all-linear": on all but
        the output head."""
        head = self.model.get_output_embeddings()
        pairs = [features(m) for m in self.model.modules() if is_linear(m) and m is not head]
        if not pairs:
            raise ValueError(f"{self._class.__name__} has no linear layer to adapt")
        return [torch.Size(shape) for k, n in pairs for shape in ((rank, k), (n, rank))]

    # ---- what tokens leave behind -----------------------------------------------------------------------------------

    def cache_bytes(self, batch: int, seq: int) -> int:
        """Bytes of all that the model keeps of `seq` tokens: keys and values, or the state of a recurrent layer.

        Two short texts are run on the meta device. What grows with the text grows on, up to a sliding window. Of a model that
        cannot be run so it is an estimate: keys and values of usual attention in every layer.
        """
        if not self._class.can_generate():
            return 0
        few, more = 8, 16
        try:
            kept = list(zip(self._kept(few), self._kept(more), strict=True))
        except Exception:  # a stranger's code, which may need values, or a picture
            kept = []
        if not kept:  # or it keeps them where nobody sees them
            return batch * seq * self._usual_cache()
        total = 0
        for (least, window), (size, _) in kept:
            per_token = (size - least) // (more - few)
            total += least + per_token * (min(seq, window - 1 if window else seq) - few)
        return batch * total

    def _kept(self, tokens: int) -> list[tuple[int, int | None]]:
        """Bytes of each tensor that the model keeps of a text, and the sliding window that limits it."""
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.config.is_encoder_decoder:
            hidden = torch.zeros(1, tokens, self.config.get_text_config().hidden_size, dtype=DTYPE, device="meta")
            inputs = {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}
        with torch.device("meta"), torch.no_grad():
            output = self.model(**inputs, use_cache=True)
        # transformers calls it "cache" from 5.24 on, and warns of whoever asks for the names before.
        names = {"cache", "past_key_values", "cache_params", "state"}
        caches = [value for name, value in output.items() if name in names]
        found = _tensors(caches, None, set())
        return [(tensor.nbytes, window) for tensor, window in found if tensor.dim()]  # a scalar counts tokens

    def _usual_cache(self) -> int:
        """Bytes of the keys and values that all layers keep of a token, by a config of usual attention.

        With an encoder, those of a token of its text are counted, too.
        """
        text = self.config.get_text_config(decoder=True)
        try:
            heads, layers = text.num_attention_heads, text.num_hidden_layers
            size = getattr(text, "head_dim", None) or text.hidden_size // heads
        except AttributeError as error:
            raise ValueError(f"how much {self._class.__name__} keeps of a token is not known: {error}") from error
        texts = 2 if self.config.is_encoder_decoder else 1
        return int(2 * texts * layers * (getattr(text, "num_key_value_heads", None) or heads) * size * DTYPE.itemsize)

    def activation_bytes(self, batch: int, seq: int, train: bool) -> int:
        """An estimate of activations: what one layer keeps for its gradient, in training the inputs of all layers, the logits.

        A layer keeps its input twice, four projections, the product with the values and three tensors of the feed-forward net;
        the logits are there in bfloat16 and, for the loss, in float32 with their gradient. One weight is dequantized at a time.
        """
        text = self.config.get_text_config()
        try:
            hidden, layers, tokens = text.hidden_size, text.num_hidden_layers, batch * seq
        except AttributeError as error:
            raise ValueError(f"the activations of {self._class.__name__} are not known: {error}") from error
        inner, vocabulary = getattr(text, "intermediate_size", None) or 4 * hidden, getattr(text, "vocab_size", 0)
        layer = tokens * (7 * hidden + 3 * inner) * DTYPE.itemsize
        weight = hidden * max(hidden, inner) * DTYPE.itemsize
        if not train:
            return int(layer + weight + batch * vocabulary * (DTYPE.itemsize + 4))
        checkpoints = layers * tokens * hidden * DTYPE.itemsize
        logits = tokens * vocabulary * (DTYPE.itemsize + 4 + 4)
        return int(checkpoints + 2 * layer + weight + logits)


def _model_class(config: Any) -> Any:
    """The class that a config names. If it names no model of transformers, that of the first of `_TASKS` for which there is a
    model of such a config; of a config with an encoder and a decoder, tasks of both come first."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, str(name), None)
        if getattr(found, "config_class", None) is not None:  # a model, and no base of all models
            return found
    tasks = sorted(_TASKS, key=lambda task: ("SEQ" in task) != config.is_encoder_decoder)
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING") for task in tasks]
    for mapping in (*mappings, modeling_auto.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"transformers {transformers.__version__} has no model for a {type(config).__name__}")


def _tensors(thing: Any, window: int | None, seen: set[int]) -> Iterator[tuple[Tensor, int | None]]:
    """The tensors in a cache, whatever classes it consists of, and the sliding window of the object that has them."""
    if thing is None or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing, window
        return
    parts: Any = ()
    if isinstance(thing, Mapping):
        parts = thing.values()
    elif isinstance(thing, (list, tuple)):
        parts = thing
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        window = getattr(thing, "sliding_window", None)
        parts = vars(thing).values()
    for part in list(parts):
        yield from _tensors(part, window, seen)
