"""The same work by Hugging Face `generate` on torch, the way people do it turn by turn.

    our weights ─ models.hf.save ─▶ directory ─ transformers ─▶ Model
    a batch of prefixes, padded on the left ─ generate ─▶ turns ─▶ one search for all ─▶ longer prefixes ─ generate ─▶ …

What it need not do is left out, in its favour: no log-probs are kept, rows that have their answer leave the batch,
and a comparison of lengths ends a turn, cheaper than any stop string.
"""

import pathlib
import tempfile
import time

import numpy as np

from searchr1_jax.bench import measuring, workload as workload_lib
from searchr1_jax.models import config as model_config, decoder, hf


class Model:
    """Our model as torch holds it: float32, on the CPU, with as many threads as torch takes."""

    def __init__(self, config: model_config.ModelConfig, params: decoder.Params):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            hf.save(pathlib.Path(directory), config, params)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None
        )
        self.write([[1, 2]], [2])  # what is made at the first call

    def write(self, prefixes: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Samples that many tokens after each prefix, in one call of `generate`."""
        import torch  # pyright: ignore[reportMissingImports]

        longest = max(map(len, prefixes))
        tokens = np.zeros((len(prefixes), longest), np.int64)
        mask = np.zeros_like(tokens)
        for i, prefix in enumerate(prefixes):
            tokens[i, longest - len(prefix) :], mask[i, longest - len(prefix) :] = prefix, 1
        limits = torch.tensor(lengths)
        with torch.inference_mode():
            out = self._model.generate(
                torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                stopping_criteria=[lambda ids, scores, **_: ids.shape[1] - longest >= limits],
                max_new_tokens=max(lengths),
            )
        new = out[:, longest:].tolist()
        return [row[:length] for row, length in zip(new, lengths, strict=True)]


def decode_seconds(model: Model, workload: workload_lib.Workload, *, slots: int, tokens: int) -> float:
    """Seconds of a decoded token, of all slots together, after the first prompts; what those cost is taken off."""
    prompts = [list(prompt) for prompt in workload.prompts[:slots]]
    first, all_ = (measuring.seconds(lambda n=n: model.write(prompts, [n] * slots)) for n in (1, 1 + tokens))
    return (all_ - first) / (tokens * slots)


def play(model: Model, workload: workload_lib.Workload, *, share: slice) -> tuple[float, int]:
    """Plays a batch of episodes to their answers. Returns seconds and the tokens that the policy wrote."""
    library = workload_lib.Library(workload)
    going = [(prompt[-1], list(prompt)) for prompt in workload.prompts[share]]  # turn to come, tokens so far
    written, began = 0, time.perf_counter()
    while going:
        lengths = [workload.turns[turn].tokens for turn, _ in going]
        new = model.write([text for _, text in going], lengths)
        written += sum(lengths)
        for (turn, text), tokens in zip(going, new, strict=True):
            text += [*tokens[:-1], workload.closing(turn)]
        going = [(turn, text) for turn, text in going if workload.turns[turn].passages]
        if going:
            for (_, text), passages in zip(going, library.find([turn for turn, _ in going]), strict=True):
                text += passages
            going = [(text[-1], text) for _, text in going]
    return time.perf_counter() - began, written
