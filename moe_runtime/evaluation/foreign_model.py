"""Any causal model that transformers loads from a folder, as evaluation asks for models.

Plain forwards on right-padded batches: causal attention never looks at what stands to the right, so padding
changes nothing. Texts are continued one at a time. This is a yardstick, not a fast path.

No code and no pickle of the folder is run: `trust_remote_code` is off and weights have to be safetensors.
What a folder says stands before every text (a beginning-of-text id) is put there, since the model was
trained so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_runtime.errors import CheckpointError, ConfigError
from moe_runtime.evaluation.language_model import Pair, Prompt
from moe_runtime.generate.stop import first_stop

BATCH_TOKENS = 8 * 1024
DEFAULT_CONTEXT = 2048  # of a model whose config does not say
_AS_IT_IS: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, AttributeError)


def is_transformers_folder(path: Path) -> bool:
    """True for a folder with the config.json of a model."""
    return (path / "config.json").is_file()


def context_of_folder(folder: Path) -> int:
    """Tokens that the model of a folder sees at most, by its config alone.

    Raises:
        ConfigError, CheckpointError: as `ForeignModel`.
    """
    try:
        return _context_in(_library(folder).AutoConfig.from_pretrained(folder, **_AS_IT_IS))
    except _LOADING_ERRORS as error:
        raise _not_loaded(folder, error) from error


class ForeignModel:
    """A model folder of transformers, with its own tokenizer.

    Args:
        folder: config.json, safetensors and a tokenizer.
        device: where its parameters go.
        batch_tokens: largest batch, padding included.

    Attributes:
        architecture: its class in transformers.
        parameters: how many it has.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: the folder holds no causal model or no tokenizer that transformers loads as it is.
    """

    def __init__(self, folder: Path, device: str = "cpu", batch_tokens: int = BATCH_TOKENS) -> None:
        transformers = _library(folder)
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **_AS_IT_IS)
            with _quiet(transformers.utils.logging):
                model, said = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype="auto", use_safetensors=True, output_loading_info=True, **_AS_IT_IS
                )
        except _LOADING_ERRORS as error:
            raise _not_loaded(folder, error) from error
        if lacking := sorted(said["missing_keys"]):  # transformers would fill them with random numbers
            raise CheckpointError(f"{folder}: expected all weights of its model, got no {lacking[0]}")
        self._model: Any = model.eval().to(device)
        self._device, self._batch_tokens = torch.device(device), batch_tokens
        self.name = str(folder)
        self.context = _context_in(model.config)
        self.architecture, self.parameters = type(model).__name__, int(model.num_parameters())
        self.start_id = self._start_id(folder)

    def encode(self, text: str, at_start: bool) -> list[int]:
        # Not verbose: how long a text is beside the model's window is our own business.
        ids: list[int] = self._tokenizer(text, add_special_tokens=at_start, verbose=False)["input_ids"]
        known = self._model.get_input_embeddings().num_embeddings
        if ids and max(ids) >= known:
            raise CheckpointError(
                f"{self.name}: expected a tokenizer whose ids are below {known}, the model's embeddings, got "
                f"{max(ids)}; the tokenizer is another model's"
            )
        return ids

    def spell(self, ids: Sequence[int]) -> bytes:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.encode()

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[float]:
        nats = self._nats([pair.context + pair.continuation for pair in pairs])
        wanted = zip(pairs, nats, strict=True)
        return [-float(one[-len(pair.continuation) :].double().sum()) for pair, one in wanted]

    @torch.no_grad()
    def continue_texts(self, prompts: Sequence[Prompt]) -> list[str]:
        return [self._continued(prompt) for prompt in prompts]

    def token_nats(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        return [one.tolist() for one in self._nats([tuple(window) for window in windows])]

    @torch.no_grad()
    def _nats(self, rows: list[tuple[int, ...]]) -> list[Tensor]:
        """Cross-entropy of every token of each row but its first, FP32."""
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        while order:
            count = max(1, self._batch_tokens // len(rows[order[0]]))
            places, order = order[:count], order[count:]
            batch = [rows[place] for place in places]
            width = len(batch[0])
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=self._device)
            here = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
            logits = self._model(input_ids=ids[:, :-1], attention_mask=here[:, :-1].to(ids.device)).logits
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
            )
            for place, row, one in zip(places, batch, nats.view(len(batch), -1).cpu(), strict=True):
                found[place] = one[: len(row) - 1]
        return found

    def _continued(self, prompt: Prompt) -> str:
        ids = torch.tensor([prompt.context], device=self._device)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": prompt.max_tokens}
        if prompt.stop:
            options |= {"stop_strings": list(prompt.stop), "tokenizer": self._tokenizer}
        pad = self._tokenizer.pad_token_id
        made = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=self.start_id if pad is None else pad,
            **options,
        )
        text = self.spell(made[0, ids.shape[1] :].tolist()).decode("utf-8", "replace")
        cut = first_stop(text, prompt.stop)
        return text if cut is None else text[:cut]

    def _start_id(self, folder: Path) -> int:
        found = [self._tokenizer.bos_token_id, self._tokenizer.eos_token_id]
        known = [one for one in found if one is not None]
        if not known:
            raise CheckpointError(
                f"{folder}: expected a tokenizer with an id that begins or ends text, got neither"
            )
        return int(known[0])


def _library(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"{folder}: a model of transformers needs that package; pip install transformers"
        ) from error
    return transformers


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without bars, and without a list of weights that are not used, such as MTP layers."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _context_in(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT)


def _not_loaded(folder: Path, error: Exception) -> CheckpointError:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{folder}: expected a causal model and a tokenizer that transformers loads without remote code, "
        f"got: {said:.200}"
    )
